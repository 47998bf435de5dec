"""Units of memory, for what is shown to people. A GiB is what GPU tools show as a gigabyte."""

GIB = 2**30
