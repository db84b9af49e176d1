"""How a process is watched while it runs, alike in gateway, engine and worker: logs, traces, what it does for ever."""
