"""
The workload that users care about: a shop over HTTP whose sessions write and read what they wrote.

`trace` says who does what and when, from a seed. `application` serves it in a process of its own,
with one of `strategies` (`oracle` is one of them) to say which server answers a read. `load` plays
the trace in another process, `stage` runs both against a cluster, and `judge` says what was stale.
"""
