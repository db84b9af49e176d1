"""What serving costs: `cost`, `cold`, `thrash`, `stall` (`mta bench`), and `gateway`."""
