"""The loop over steps, and what happens between them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np

from parallel_clip.checkpoint.checkpointer import Checkpointer
from parallel_clip.checkpoint.meta import Meta
from parallel_clip.config import training_sources
from parallel_clip.engine import device
from parallel_clip.engine.groups import Groups
from parallel_clip.evaluate.held_out import HeldOutEvaluation
from parallel_clip.evaluate.interrupt import EvaluationInterrupted, InterruptibleBatches
from parallel_clip.optimizer.train_state import TrainState
from parallel_clip.plan.build import build_loss
from parallel_clip.plan.run_plan import RunPlan
from parallel_clip.training.bad_steps import BadStepPolicy
from parallel_clip.training.exchange import tell_all
from parallel_clip.training.feed import DeviceFeed, StepBatch
from parallel_clip.training.learning_rate import learning_rate
from parallel_clip.training.lease import LeaseToken
from parallel_clip.training.run_folder import layout_tree
from parallel_clip.training.run_log import RunLog, StepRecord, StepTimer
from parallel_clip.training.sample_log import SampleLog
from parallel_clip.training.status import State, write_failure, write_status
from parallel_clip.training.step import TrainStep
from parallel_clip.training.stop import REASONS, StopRequests
from parallel_clip.training.watchdog import Progress


class TrainingLoop:
    """The loop over steps, and what happens between them: metrics, checkpoints, evaluations, and
    the agreement of all ranks to stop."""

    def __init__(
        self,
        plan: RunPlan,
        groups: Groups,
        state: TrainState,
        checkpointer: Checkpointer,
        held_out: HeldOutEvaluation,
        requests: StopRequests,
        progress: Progress,
        token: LeaseToken | None,
    ):
        self.plan = plan
        self.token = token
        self.config = plan.config
        self.groups = groups
        self.state = state
        self.checkpointer = checkpointer
        self.held_out = held_out
        self.requests = requests
        self.progress = progress
        layout_plan, before = plan.layout_plan, plan.resume.meta
        self.policy = BadStepPolicy(
            plan.config.bad_steps,
            tuple(before.grad_norms) if before else (),
            tuple(before.skipped) if before else (),
        )
        self.updates = before.updates if before else 0
        # Until a step is good.
        self.measures_bias = before.measures_bias if before else plan.logits.measures_bias
        self.step = TrainStep(
            state,
            build_loss(layout_plan, groups),
            layout_plan.stash,
            groups.pipeline,
            layout_plan.loss_on_all_stages,
            self.policy.complaint,
            groups.world,
        )
        # Of every rank, at the end of the last step; None: not known, as before the first one.
        self.told_flags: np.ndarray | None = None
        self.timer = StepTimer()
        self.recent_steps = deque([0.0], maxlen=20)  # seconds
        own = sum(tensor.numel() for _, tensor in state.global_parameters())
        saved = 12 if state.average is None else 16  # bytes of a parameter
        self.first_save_seconds = saved * own / groups.layout.data / 1e8  # at 100 MB/s
        self.log = RunLog.of_plan(plan) if groups.is_rank_zero else None
        self.samples = SampleLog(
            plan.run_dir,
            groups,
            plan.batch.global_batch,
            plan.steps,
            plan.epochs_by,
            plan.config.data.max_bad_fraction,
            before.bad_samples if before else 0,
            _seen_of_sources(before, len(plan.blends[0].pairs)),
        )

    def run(self, feed: DeviceFeed) -> bool:
        """Train from the step resumed from to the last one of the model as it is built, or until
        all ranks agree to stop. Whether the run goes on, with another model."""
        done, stop = self.plan.resume.step, self.plan.stop
        self._write_status("running", done)
        try:
            batches = feed.batches(done, stop)
            interrupted = self.plan.evaluates_first and not self._evaluate(done)
            while done < self.plan.steps or interrupted:
                reason = self._reason_to_stop(done + 1)
                if reason is not None:
                    self._stop(done, reason)
                    return False
                if done == stop:
                    if self.log is not None:
                        self.log.write_end()
                    return True
                self._train_step(done + 1, batches)
                done += 1
                interrupted = not self._save_and_evaluate(done)
            self._write_status("finished", self.plan.steps)
            if self.log is not None:
                self.log.write_end(f"finished: {self.plan.steps} steps, {self.plan.run_dir}")
            return False
        except BaseException as error:
            if self.token is None or self.token.is_seen():  # else the folder is another job's
                write_failure(self.plan.run_dir, done, error)
            raise
        finally:
            if self.log is not None:
                self.log.close()

    def _reason_to_stop(self, step: int) -> str | None:
        """What any rank has been asked, before `step`; the same on every rank. Also commits an
        asynchronous checkpoint that every rank has written."""
        flags = self.told_flags
        # While a checkpoint is written beside training, ranks ask anew, to commit it the sooner.
        if flags is None or self.checkpointer.has_pending:
            self.progress.mark("agreeing whether to go on", step)
            flags = tell_all(None, self._own_flags(), self.groups.device, self.groups.world)
        self.told_flags = None
        *asked, writing = flags.any(axis=0).tolist()
        if self.checkpointer.has_pending and not writing:
            self.checkpointer.finish()
        return next((reason for reason, ranks in zip(REASONS, asked, strict=True) if ranks), None)

    def _own_flags(self) -> list[int]:
        return [
            *self.requests.flags(self._needed_seconds()),
            int(self.checkpointer.is_writing),
        ]

    def _needed_seconds(self) -> float:
        """What one more step and a save would take, with something to spare."""
        save = self.checkpointer.longest_save or self.first_save_seconds
        return 2 * max(self.recent_steps) + 1.5 * save

    def _stop(self, step: int, reason: str) -> None:
        """Save the state after `step`, unless it is saved, and note why the run stops."""
        self.progress.mark("saving before the end", step)
        self.checkpointer.finish()
        if self.checkpointer.whole_step != step:
            self.checkpointer.save(self._meta(step), self.state, last=True)
        self._write_status("stopped", step, reason)
        if self.log is not None:
            self.log.write_end(
                f"stopped after step {step} of {self.plan.steps} ({reason}), saved; the same "
                "command goes on"
            )

    def _train_step(self, step: int, batches: Iterator[StepBatch]) -> None:
        self.progress.mark("waiting for data", step)
        began = time.perf_counter()
        batch = next(batches)
        self.timer.add_step(data_seconds=time.perf_counter() - began)
        counts = self.samples.own_counts(batch)
        peak = self.plan.peak_at(step - 1)
        lr = learning_rate(step - 1, self.plan.steps, peak, self.config.schedule)
        self.progress.mark("forward, backward and update")
        record, told = self.step(
            batch.inputs,
            lr,
            lambda: [*counts, device.peak_memory_bytes(), *self._own_flags()],
            self.measures_bias,
        )
        self.progress.mark("writing logs")
        self.samples.count(step, batch, told[:, : len(counts)])
        self.told_flags = told[:, len(counts) + 1 :]
        if record.complaint is None:
            if self.measures_bias and self.log is not None:
                print(f"logit_bias measured on the first batch: {record.logit_bias:.4g}")
            self.measures_bias = False
            self.updates += 1
            if self.state.average is not None:
                self.state.average.after_update(self.updates)
            self.policy.count_good(record.grad_norm)
        else:
            self.policy.count_bad(step, record.complaint)
            self.samples.write_skipped(step, batch)
        if self.config.log.ledger:
            self.samples.write_ledger(step, batch)
        self.recent_steps.append(time.perf_counter() - began)
        if step == 1 or step % self.config.log.every == 0 or record.complaint is not None:
            self._write_metrics(step, record, int(told[:, len(counts)].max()))

    def _write_metrics(self, step: int, record: StepRecord, memory: int) -> None:
        means = self.timer.means(self.plan.batch.global_batch)
        self.timer = StepTimer()
        device.reset_peak_memory()
        if self.log is not None:
            bad, of_sources = self.samples.bad_samples, self.samples.source_samples
            self.log.write_step(step, record, means, memory, bad, of_sources)
            self._write_status("running", step)

    def _save_and_evaluate(self, step: int) -> bool:
        """Save and evaluate where the config asks for it after `step`, and after the last one of
        the model as it is built. False where the evaluation was interrupted."""
        began = time.perf_counter()
        last, every = step == self.plan.stop, self.config.checkpoint.every
        # Saved first: held-out shards that turn out to be bad must not cost the training.
        if (every and step % every == 0) or last:
            self.progress.mark("saving a checkpoint", step)
            self.checkpointer.save(self._meta(step), self.state, last=last)
            self.told_flags = None  # that was before; this took a while
            self.timer.add_pause(self.checkpointer.last_pause)
        complete = not self.plan.evaluates_after(step) or self._evaluate(step)
        self.timer.leave_out(time.perf_counter() - began)
        return complete

    def _evaluate(self, step: int) -> bool:
        """False: all ranks left the evaluation because one of them is asked to stop."""
        self.progress.mark("evaluating", step)
        self.told_flags = None
        batches = InterruptibleBatches(
            self.groups.world,
            self.groups.device,
            lambda: any(self.requests.flags(self._needed_seconds())),
            ahead=self.groups.layout.pipeline,
            tick=self.progress.mark_again,
        )
        of_averages = self.config.evaluate.ema
        if of_averages:
            self.state.average.exchange_with_weights()
        results = None
        with suppress(EvaluationInterrupted):
            results = self.held_out.evaluate(batches)
        # Any other error ends the run, and may be this rank's alone: nothing is put back, as that
        # takes all ranks.
        if of_averages:
            self.state.average.exchange_with_weights()
        if results is not None and self.log is not None:
            self.log.write_evaluation(step, results, of_averages)
        return results is not None

    def _meta(self, step: int) -> Meta:
        plan = self.plan
        model = Meta.of_model(plan.architecture, plan.preprocess.to_openclip(), plan.tokenizer_name)
        changed = plan.architecture != plan.model
        return replace(
            model,
            step=step,
            position=step * plan.batch.global_batch,
            bad_samples=self.samples.bad_samples,
            source_samples=tuple(self.samples.source_samples),
            run_model=plan.model.json if changed else None,
            data=plan.data_fingerprint
            | {"shards": [source.shards for source in training_sources(plan.config).sources]},
            has_averages=self.state.average is not None,
            updates=self.updates,
            frozen=tuple(sorted(plan.frozen.names)),
            trained_since=plan.trained_since,
            measures_bias=self.measures_bias,
            grad_norms=tuple(self.policy.grad_norms),
            skipped=tuple(self.policy.skipped),
            config=plan.config.to_record(),
            layout=layout_tree(plan) | {"world": plan.layout.world},
            versions=plan.versions,
        )

    def _write_status(self, state: State, step: int, reason: str | None = None) -> None:
        if not self.groups.is_rank_zero:
            return
        try:
            write_status(self.plan.run_dir, state, step, reason)
        except OSError:  # while it runs, a save decides whether it goes on
            if state != "running":
                raise


def _seen_of_sources(before: Meta | None, sources: int) -> list[int]:
    """Pairs seen so far of each source. Phases that are still to come may have other sources than
    when the checkpoint was written, of which it has seen none."""
    seen = list(before.source_samples[:sources]) if before else []
    return seen + [0] * (sources - len(seen))
