"""docs/performance.md from the JSON of the other benchmarks: `mta bench report`."""
