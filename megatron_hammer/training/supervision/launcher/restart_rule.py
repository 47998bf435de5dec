"""Whether a run that failed is started again: a bounded number of times, and only while it gets further. Pure."""

MAX_RESTARTS_WITHOUT_PROGRESS = 3


class RestartRule:
    """Counts the restarts of one run.

    max_restarts: as --max-restarts; a restart that finished no step counts double. saved_step: of the newest checkpoint
    as the run starts, 0 without one. Progress is a newer checkpoint: only that is left after the next failure.
    """

    def __init__(self, max_restarts: int, saved_step: int):
        self.max_restarts = max_restarts
        self.num_restarts = 0
        self.num_counted = 0  # with each fruitless restart counted twice
        self.num_without_progress = 0
        self._saved_step = saved_step

    def refuse(self, *, has_finished_step: bool, saved_step: int) -> str | None:
        """Judge the attempt that has just failed: None if it is started again, which counts; else the reason.

        has_finished_step: whether this attempt finished a step. saved_step: of the newest checkpoint now.
        """
        if saved_step > self._saved_step:
            self._saved_step = saved_step
            self.num_without_progress = 0
        elif self.num_restarts:  # the first attempt is no restart
            self.num_without_progress += 1
        if self.num_restarts and not has_finished_step:
            self.num_counted += 1
        if self.max_restarts == 0:
            return "--max-restarts is 0"
        if self.num_without_progress >= MAX_RESTARTS_WITHOUT_PROGRESS:
            return f"{self.num_without_progress} restarts in a row ended before the next checkpoint"
        if self.num_counted >= self.max_restarts:
            return (
                f"--max-restarts is {self.max_restarts}, and {self.num_restarts} restarts are made "
                "(one that finishes no step counts double)"
            )
        self.num_restarts += 1
        self.num_counted += 1
        return None
