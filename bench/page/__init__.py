"""`mta bench report`: fill docs/performance.md from the JSON files of the other benchmarks."""
