"""The engine around a method: its folder, parts, seeds, passes, log and checkpoints. It knows no clustering.

    with Run(args, fixed=("arch", "seed", ...)) as run:
        images = run.open_images()
        net = run.network(models.build(args.arch, seed=run.seed("weights")))
        optimizer = sgd(net.parameters(), args.lr, 0.9, 1e-6)
        run.keep(images=images, net=net, optimizer=optimizer)  # restored here where the run is resumed
        for epoch in run.epochs(args.epochs):
            draws = ...                                        # (T,) indexes of images
            run.train_pass(net, [optimizer], view, draws, loss)
            run.finish_epoch()

A method keeps its own short loop and hands over values; what is kept has state_dict and load_state_dict.
Under torchrun every process runs all of it, on its part of the images.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import checkpoint
import data
import distributed
from data import ImageList, PlainView, RandomView
from data.sampling import ShareSampler
from data.views import Batch
from features import Pass, extract_features, without_rows
from models.inputs import Inputs
from models.network import Network
from models.parallel import Share, share_among_ranks
from models.weights import init_weights
from training import logs, machine
from training.folder import Folder, origin_of, refuse_images_folder
from training.optim import Schedule
from training.parts import Parts, global_batch
from training.signals import Signals
from training.steps import Loss, Steps, deal
from util import AverageMeter, Log, Preempted, Progress, UserError, derive_seed, explain, set_precision


class Run:
    """A training that can be interrupted at any moment and goes on exactly; use it in a with statement.

    args: the command line; the engine reads exp, resume, seed, device, precision, workers, batch (of all
    ranks), verbose, checkpoints and the like of it. method: what its checkpoints are of. fixed: names in args
    that have to be as they were where a run goes on. own_files: write METHOD.pth.tar, .log and .jsonl rather
    than checkpoint.pth.tar, train.log and log.jsonl, so that an evaluation can lie beside what it evaluates.

    epoch: the one that is being made; position: steps in it; iteration: steps in all; inputs: what it sees.
    """

    def __init__(
        self, args: argparse.Namespace, method: str, fixed: Sequence[str], own_files: bool = False
    ) -> None:
        self.args, self.method, self.fixed = args, method, tuple(fixed)
        names = (f"{method}.pth.tar", f"{method}.log", f"{method}.jsonl")
        names = names if own_files else ("checkpoint.pth.tar", "train.log", "log.jsonl")
        self.exp = Path(args.exp)
        self.folder = Folder(self.exp, names[0], keep=not own_files)
        self._log_file, self.lines = (self.exp / name for name in names[1:])
        self.share, self.signals, self.parts = Share(), Signals(), Parts()
        self.sync_bn, self.inputs = False, Inputs()
        self.epoch = getattr(args, "start_epoch", 0)
        self.position = self.iteration = 0
        self.record: dict[str, Any] = {"seconds": {}}
        self.meter, self._told = AverageMeter(), False

    # -- from start to end

    def __enter__(self) -> "Run":
        args = self.args
        self.signals.__enter__()
        try:
            self.device = distributed.init(args.device)
            self._check_machine()
            self.log = Log(quiet=not distributed.is_main())
            args.resume = distributed.on_main(self._open_folder)
            self.resumed = args.resume is not None
            if self.resumed:
                self._read(Path(args.resume))
            board = getattr(args, "tensorboard", False) and distributed.is_main()
            self.board = logs.open_tensorboard(self.exp) if board else None
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        self.signals.__exit__()
        self.folder.close()
        distributed.shutdown()
        # What a library makes of a signal that came while it computed is not what ended the run.
        if self.signals.asked is not None and error is not None and not isinstance(error, Preempted):
            raise self.signals.asked from error

    def _check_machine(self) -> None:
        """Refuse settings that this machine cannot do, before anything is written."""
        args, ranks = self.args, distributed.world_size()
        set_precision(args.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.precision == "fp16")
        self.batch = getattr(args, "batch", None) or args.batch_size * ranks
        if self.batch < ranks:
            raise UserError(f"--batch {self.batch}: is of all {ranks} processes together")
        side = max([args.image_size] if hasattr(args, "image_size") else args.size_crops)
        machine.check_shared_memory(args.workers, -(-self.batch // ranks), side)
        if getattr(args, "compile", False):
            machine.check_compiler(self.device)

    def _open_folder(self) -> str | None:
        """Lock EXP and find the checkpoint to go on from; a new run begins with an empty log."""
        refuse_images_folder(self.exp, getattr(self.args, "dir", None))
        self.folder.open()
        self.log = Log(self._log_file)
        found = self.folder.find(self.args.resume, self.log)
        if found is None:
            self.lines.unlink(missing_ok=True)
        return found

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return distributed.is_main()

    @property
    def origin(self) -> Path:
        """The folder of the run that goes on here: EXP itself, or another one."""
        return origin_of(self.args.resume) if self.resumed else self.exp

    def _read(self, path: Path) -> None:
        """Take over a checkpoint's place and log; its parts follow when they are kept."""
        saved = self.parts.read(path, self.method, vars(self.args), self.fixed, self.log)
        self.epoch, self.position, self.iteration = (saved[k] for k in ("epoch", "position", "iteration"))
        self.batch = global_batch(saved, vars(self.args), self.batch, path, self.log)
        self.record = saved["record"]
        self.meter.sum, self.meter.count = saved["loss"]["sum"], saved["loss"]["count"]
        if self.scaler.is_enabled() and saved.get("scaler"):
            self.parts.restore("scaler", self.scaler, saved["scaler"])
        distributed.on_main(self._restore_log, origin_of(path))
        self.log(f"resuming {path} in epoch {self.epoch} after {self.iteration} iterations")

    def _restore_log(self, origin: Path) -> None:
        self.folder.set_aside((self.epoch, self.iteration), self.log)
        logs.take_over(self.lines.name, origin, self.exp)
        logs.keep_lines_before(self.lines, self.epoch)

    def keep(self, **parts: Any) -> None:
        """These belong to the run: they are in every checkpoint from now on.

        Where the run is resumed, a part is restored here, once. Raises UserError where it does not fit.
        """
        self.parts.keep(**parts)

    def forget(self, name: str) -> None:
        """What a resumed run has saved of this part is void: the part is made anew."""
        self.parts.forget(name)

    # -- what a method asks for

    def seed(self, *what: int | str) -> int:
        """A seed from (args.seed, what), never from history."""
        return derive_seed(self.args.seed, *what)

    def open_images(self, enough: Callable[[ImageList], None] | None = None) -> ImageList:
        """The images that DIR or --shards names, those that cannot be read told or left out."""
        args = self.args
        machine.warn_of_workers(args.workers, self.log)
        return data.open_images(
            args.dir, args.shards, bad_list=self.exp / "bad_images.txt", skip_bad=args.skip_bad_images,
            all_splits=getattr(args, "all_splits", False), scaled=getattr(args, "scaled_decoding", False),
            workers=args.workers, enough=enough, log=self.log,
        )  # fmt: skip

    def network(self, net: nn.Module, init: str | None = None, sync_bn: bool = False) -> nn.Module:
        """net on the device, over the ranks, compiled if asked for.

        init: a file to take its weights from; sync_bn: batch norm over the batches of all ranks.
        """
        if init:
            init_weights(net, init)
        self.sync_bn = sync_bn
        if distributed.world_size() > 1:
            share_among_ranks(net, self.share, sync_bn)
        if getattr(self.args, "compile", False):
            net.compile()
        return net.to(self.device, memory_format=torch.channels_last)

    def epochs(self, last: int) -> Iterator[int]:
        """The epochs from where the run stands to `last`; each has to end with finish_epoch."""
        if self.resumed and self.epoch > 0 and self.position == 0:  # it may have been killed before this
            self._keep_epoch(again=False)
        if self.epoch >= last:
            self.log(f"nothing to do: this run has its {self.epoch} epochs; ask for more with --epochs")
        while self.epoch < last:
            epoch = self.epoch
            yield epoch
            if self.epoch == epoch:
                raise RuntimeError("an epoch ended without finish_epoch")

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """What the block does is shown on a terminal, and its seconds stand in the log line under `what`."""
        progress = Progress(1, f"epoch {self.epoch} {what}", unit="step", log=self.log)
        progress.update(0)
        yield
        progress.clear()
        self.record["seconds"][what] = progress.seconds

    # -- passes over the images

    def feature_pass(self, net: Network, view: PlainView, layer: str) -> np.ndarray:
        """Activations of a layer for this rank's images in order, net in eval mode: (n_r, D).

        In the dtype of --feature-dtype. Images that turn out to be undecodable leave the run, and the list
        itself, before its first step; later they stop it.
        """
        rows = distributed.share_of(len(view))
        ranks = " of rank 0" if distributed.world_size() > 1 else ""
        progress = Progress(len(rows), f"epoch {self.epoch} features{ranks}", log=self.log)
        how = Pass(self.batch, self.args.workers, self.device, self.args.precision)
        dtype = np.dtype(getattr(self.args, "feature_dtype", "float32"))
        features, broken = extract_features(net, layer, view, how, rows, dtype, progress)
        progress.close()
        self.record["seconds"]["features"] = progress.seconds
        self._count_images("features", len(view), progress.seconds)
        broken = sorted(i for part in distributed.gather_objects(broken) for i in part)
        if not broken:
            return features
        images, names = view.images, self.exp / "bad_images.txt"
        bad = data.reasons(images, broken)
        if self.iteration > 0:
            raise UserError(f"{images.path(broken[0])}: was readable before and is no longer: {bad[0][1]}")
        data.leave_out(images, bad, names, self.args.skip_bad_images, self.log)
        view.cache = None  # it has rows for images that are no longer there
        return without_rows(features, broken, rows)

    def train_pass(
        self,
        net: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        view: RandomView,
        draws: np.ndarray,
        loss: Loss,
        *,
        schedule: Schedule | Sequence[Schedule] | None = None,
        clip: float | None = None,
        after_backward: Callable[[int], None] | None = None,
    ) -> None:
        """What is left of the epoch's pass over the images that draws (T, ...) names, a step a global batch.

        loss: training/steps.py. Writes a checkpoint every --checkpoints steps. A signal ends it, on every
        rank after the same step, with a checkpoint.
        """
        sampler = ShareSampler(draws, self.batch, self.position, distributed.rank(), distributed.world_size())
        self._check_sampler(sampler)
        view = view.at(self.args.seed, self.epoch)
        loader = data.make_loader(view, self.batch, self.args.workers, self.device, batch_sampler=sampler)
        left, before = sum(total for total, _ in sampler.shares()), self.meter.count
        progress = Progress(left, f"epoch {self.epoch} training", log=self.log)
        options = (schedule, clip, after_backward, self.inputs)
        steps = Steps(net, optimizers, loss, self.device, self.args.precision, self.scaler, *options)
        net.train()
        with self.signals.held():
            for total, batch in self._watched(deal(loader, sampler, self.share)):
                torch.manual_seed(self._before_step())
                value, stopped = steps.step(batch, total, self.iteration - 1, self.signals.asked is not None)
                self.meter.update(value, total)
                progress.update(total, f"loss {self.meter.avg:.4f}")
                if stopped:
                    self._stop()
            if not self.sync_bn:  # the first rank's running statistics are the network's
                distributed.broadcast_tensors(net.buffers())
            if self.signals.on_any_rank():  # in the last step, after that had asked
                self._stop()
        progress.close(f"loss {self.meter.avg:.4f}")
        self.record["seconds"]["train"] = progress.seconds
        self._count_images("train", self.meter.count - before, progress.seconds)

    @torch.no_grad()
    def look_pass(self, net: nn.Module, view: RandomView, draws: np.ndarray, see: Loss) -> None:
        """Show the images that draws names to net as train_pass would, in train mode, without training.

        see(net, views, indexes): its result is not used. No step is counted and no checkpoint written.
        """
        sampler = ShareSampler(draws, self.batch, 0, distributed.rank(), distributed.world_size())
        view = view.at(self.args.seed, self.epoch)
        loader = data.make_loader(view, self.batch, self.args.workers, self.device, batch_sampler=sampler)
        progress = Progress(len(draws), f"epoch {self.epoch} first look", log=self.log)
        net.train()
        for total, batch in deal(loader, sampler, self.share):
            torch.manual_seed(self.seed("look", progress.done))
            with set_precision(self.args.precision, self.device):
                see(net, data.to_input(batch.views, self.device), batch.index)
            progress.update(total)
        progress.close()

    def _check_sampler(self, sampler: ShareSampler) -> None:
        """Refuse a place beyond the epoch; say, once, that its last two batches are one."""
        if self.position > sampler.steps:
            raise UserError(
                f"--resume {self.args.resume}: stands at step {self.position} of an epoch that has "
                f"{sampler.steps}; take another checkpoint"
            )
        if sampler.joined and not self._told:
            self._told = True
            self.log("the last batch of an epoch would be of one image, which joins the batch before it")

    def _watched(self, batches: Iterator[tuple[int, Batch]]) -> Iterator[tuple[int, Batch]]:
        """The batches; where the workers that make them have died a checkpoint is written."""
        try:
            yield from batches
        except (RuntimeError, ConnectionError, EOFError) as error:
            known = explain(error)
            if known is None:
                raise
            if distributed.world_size() == 1:  # else the others are in their step: the last one it is
                self.save(self.folder.last)
            raise UserError(f"{known}; go on with --resume auto") from error

    def _count_images(self, what: str, number: int, seconds: float) -> None:
        rate = round(number / max(seconds, 1e-9), 1)
        self.record["images_per_second"] = self.record.get("images_per_second", {}) | {what: rate}

    def _before_step(self) -> int:
        """Write a periodic checkpoint when one is due; the seed of the step that follows."""
        every = getattr(self.args, "checkpoints", None)
        if every and self.iteration % every == 0:
            self.save(self.folder.periodic(self.iteration // every))
        if self.args.verbose and self.position and self.position % 100 == 0:
            self.log(f"epoch {self.epoch} iteration {self.position} mean loss {self.meter.avg:.4f}")
        self.position += 1
        self.iteration += 1
        return self.seed("step", self.iteration)

    def _stop(self) -> None:
        """End the run after this step, as a signal asked for; on every rank."""
        self.save(self.folder.last)
        raise self.signals.asked or Preempted("another rank was asked to stop: go on with --resume auto")

    # -- log and checkpoint

    def finish_epoch(self, log_k: float | None = None, save: bool = True, **figures: Any) -> dict[str, Any]:
        """Write the epoch's log line and checkpoint, and stand before the next epoch; returns the record.

        log_k: the loss of guessing; one that stays there, or is far above, is warned about. save: False where
        epochs are so short that a checkpoint every --checkpoints steps is enough.
        """
        loss = self.meter.avg
        record = {"epoch": self.epoch, **self.record, **figures, "loss": loss, "iteration": self.iteration}
        if log_k is not None:
            record["loss_over_log_k"] = loss / log_k
            advice = logs.advice(self.epoch, loss, log_k, vars(self.args))
            if advice is not None:
                self.log(f"warning: {advice}")
        record |= machine.costs(record["seconds"], self.device)
        self.epoch, self.position = self.epoch + 1, 0
        self.record, self.meter = {"seconds": {}}, AverageMeter()
        with self.signals.held():
            if distributed.is_main():
                logs.append_line(self.lines, record)
            if save or self.signals.on_any_rank():
                self.save(self.folder.last)
            self._keep_epoch()
        if self.board is not None:
            logs.to_tensorboard(self.board, record)
        return record

    def _keep_epoch(self, again: bool = True) -> None:
        path = self.folder.of_epoch(self.epoch - 1, *map(vars(self.args).get, ("checkpoint_freq", "epochs")))
        if path and (again or not distributed.on_main(path.exists)):
            self.save(path)

    def save(self, path: Path) -> None:
        """Everything from which the run goes on exactly; `epoch` is the one to go on with."""
        state = self.state()  # on every rank: some parts are gathered from all
        if distributed.is_main():
            with self.signals.held():
                checkpoint.save(path, state)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: the place, the parts, the settings."""
        return {
            "method": self.method,
            "epoch": self.epoch,
            "position": self.position,
            "iteration": self.iteration,
            "batch": self.batch,
            **self.parts.state_dict(),
            "scaler": self.scaler.state_dict(),
            "record": self.record,
            "loss": {"sum": self.meter.sum, "count": self.meter.count},
            "args": vars(self.args),
            "inputs": self.inputs.state_dict(),
            "versions": machine.versions(),
        }
