"""How a process runs and is watched, alike in gateway, engine and worker: logs, traces, what it does for ever."""
