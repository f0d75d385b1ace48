"""What the exit code of a rank, and of a launch, says beyond 0 (done), 1 (a bug) and 2 (a person's mistake).

In: nothing. Out: numbers that the launcher, batch scripts and people agree on.
"""

STOPPED = 85  # asked to stop, and saved: the same command goes on from there
HUNG = 86  # nothing moved for as long as the watchdog waits
LOST = 87  # a host was lost, and no more restarts were allowed: the same command goes on once there are hosts
