"""Entry point: `torchrun ... -m titan_fp8.train --job.config_file train_configs/debug.toml` (see run_train.sh).

`Trainer` is torchtitan's, with a train step that decides on the device whether the optimizer may act:

    forward, backward (loss * loss scale)  ->  norms of all gradients  ->  the optimizer unscales and clips
    norm not finite?  the optimizer's step is a no-op on the device, the loss scale backs off, the watch remembers
    norm far beyond the others?  a no-op too, if [stability] gradient_outlier says so (stability/gate.py)
    FP8 scales for the next step (the converter's hook)  ->  at log steps and before checkpoints the host looks, and the
    policy decides (respond.py)
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

LAUNCHER = os.getppid()  # now: what follows takes seconds, in which it may die

from titan_fp8 import device  # noqa: E402

device.install()  # before anything of torchtitan is imported

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from torchtitan import train as titan  # noqa: E402
from torchtitan.components.loss import IGNORE_INDEX  # noqa: E402
from torchtitan.config import TORCH_DTYPE_MAP  # noqa: E402
from torchtitan.distributed import utils as dist_utils  # noqa: E402
from torchtitan.tools.logging import init_logger, logger  # noqa: E402

from titan_fp8.checkpoint import SafeCheckpointManager, restarted  # noqa: E402
from titan_fp8.checkpoint_folder import claim  # noqa: E402
from titan_fp8.config import load_config  # noqa: E402
from titan_fp8.data.dataset import unigram_entropy  # noqa: E402
from titan_fp8.errors import NotFinite, UserError  # noqa: E402
from titan_fp8.float8.convert import scaling_state  # noqa: E402
from titan_fp8.float8.loss_scale import LossScaler  # noqa: E402
from titan_fp8.interrupt import StopRequest, die_with_launcher  # noqa: E402
from titan_fp8.respond import Response  # noqa: E402
from titan_fp8.stability.statistics import FiniteWatch, Statistics, plain  # noqa: E402


class Trainer(titan.Trainer):
    """torchtitan's Trainer with gradient gating, loss scaling, FP8 reporting and safe checkpoints."""

    def __init__(self, job_config: Any):
        super().__init__(job_config)
        (self.model,) = self.model_parts
        adapter = self.train_spec.state_dict_adapter(self.model_args, job_config.model.hf_assets_path)
        checkpoint = job_config.checkpoint
        if checkpoint.enable and (checkpoint.last_save_in_hf or checkpoint.initial_load_in_hf):
            adapter.check()
        self.scaling = scaling_state(self.model)
        if self.scaling is not None:
            (optimizer,) = self.optimizers  # of the one model part; torch's AdamW takes no amaxes
            self.scaling.stepped = getattr(optimizer, "amaxes", {})
        self.loss_scaler = LossScaler(job_config.fp8.loss_scale, self.device)
        self.loss_scale_change: torch.Tensor | float = 1.0  # since the checkpoint that was loaded
        dims = self.parallel_dims
        if dims.tp_enabled and not dims.fsdp_enabled:  # torchtitan 0.2.2 would train in float32
            dtype = TORCH_DTYPE_MAP[job_config.training.mixed_precision_param]
            self.maybe_enable_amp = torch.autocast(self.device.type, dtype=dtype)
            if job_config.validation.enable:
                self.validator.amp = self.maybe_enable_amp
            logger.info(f"Mixed precision training is handled by AMP after all, in {dtype}")
        self.parameters = {plain(name): p for name, p in self.model.named_parameters()}
        blocks = {
            f"layers.{name}": block for name, block in self.model.get_submodule("layers").named_children()
        }
        # [P] bool: parameters of which a tensor-parallel rank has a part. "tp" is the last dimension of their mesh.
        self.split = torch.tensor(
            [dims.tp_enabled and p.placements[-1].is_shard() for p in self.parameters.values()],
            device=self.device,
        )
        self.watch = FiniteWatch(blocks, list(self.parameters), self.device)
        self.token_bytes = torch.from_numpy(self.tokenizer.token_byte_lengths())  # stays on CPU, as labels do
        self.statistics: Statistics | None = None
        if job_config.stability.statistics:
            tp = dims.get_mesh("tp").get_group() if dims.tp_enabled else None
            batch = job_config.training.local_batch_size
            self.statistics = Statistics(self.model, self.model.observer, batch, tp, self.scaling)
        # What the checkpoint that is about to be loaded holds of `state_dict`; None: everything is asked for.
        self.asked: Collection[str] | None = None
        self.started = False  # has this process trained a step
        self.first_step = 0  # of this process
        self.stop_request = StopRequest(self.device)
        self.stopped = False  # as asked, before the last step
        self.response = Response(self)

        self.checkpointer.close()
        self.checkpointer = SafeCheckpointManager(
            dataloader=self.dataloader,
            model_parts=self.model_parts,
            optimizers=self.optimizers,
            lr_schedulers=self.lr_schedulers,
            states={"train_state": self, "policy": self.response},
            checkpoint_config=checkpoint,
            sd_adapter=adapter,
            base_folder=job_config.job.dump_folder,
        )
        processor = self.metrics_processor
        if dist.get_rank() == 0:  # it reads millions of tokens, and only rank 0 shows it
            processor.unigram_entropy = unigram_entropy(job_config, self.tokenizer)
        folder = os.path.normpath(job_config.job.dump_folder)
        processor.next_command = f"python tools/plot_run.py {folder}   (a picture of this run)"
        processor.log_folder = _log_folder(job_config)
        if self.scaling is not None:
            processor.fp8_report = self.scaling.report
        if self.statistics is not None:
            processor.statistics = self.statistics.collect

    def init_distributed(self) -> Any:
        dims = super().init_distributed()
        if dims.dp_replicate > 1 and dims.dp_shard == 1:
            raise UserError(
                f"plain data parallel is not supported (torchtitan 0.2.2 halves its gradients), got replicate degree "
                f"{dims.dp_replicate} with shard degree 1: use --parallelism.data_parallel_replicate_degree=1 (FSDP2)"
            )
        return dims

    def forward_backward_step(
        self, *, input_dict: dict[str, torch.Tensor], labels: torch.Tensor, global_valid_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch. Returns this rank's summed loss over the global token count."""
        with self.train_context():
            with self.maybe_enable_amp:
                # Not by torchtitan's loss_fn, which takes logits: see titan_fp8/loss.py.
                loss = self.model(input_dict["input"], labels) / global_valid_tokens
            (loss * self.loss_scaler.scale).backward()
        return loss

    def train_step(self, data_iterator: Any) -> None:
        if not self.started:
            self.started = True
            self.first_step = self.step
            self.metrics_processor.resume(self.step - 1)
            if self.scaling is not None:
                self.scaling.scale_weights()  # they may have been loaded without FP8 state
                self.scaling.rescale_gradients(self.loss_scale_change)
        self.optimizers.zero_grad()
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]

        microbatches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        local_tokens = sum((labels != IGNORE_INDEX).sum() for _, labels in microbatches)
        sums = torch.stack([local_tokens, sum(self._text_bytes(labels) for _, labels in microbatches)])
        sums = sums.to(self.device)
        if self.parallel_dims.dp_enabled:
            dist.all_reduce(sums, group=self.parallel_dims.get_mesh("batch").get_group())
        tokens, text_bytes = sums.unbind()

        shown = self.metrics_processor.should_log(self.step)
        looks = self.statistics if shown or self._compiles_observation() else None
        losses = []
        for index, (input_dict, labels) in enumerate(microbatches):
            if looks is not None and index == len(microbatches) - 1:
                looks.begin()
            input_dict = {key: value.to(self.device) for key, value in input_dict.items()}
            loss = self.forward_backward_step(
                input_dict=input_dict, labels=labels.to(self.device), global_valid_tokens=tokens
            )
            losses.append(loss.detach())
        loss = torch.stack(losses).sum()
        if looks is not None:
            looks.end()
            if shown:
                looks.before_update()

        grads = self._gradients()
        norms = self._gradient_norms(grads)
        scale = self.loss_scaler.scale
        grad_norm = torch.linalg.vector_norm(norms) / scale
        overflow = ~grad_norm.isfinite()
        outlier = self.response.gate.judge(self.step, grad_norm)
        if self.response.gate.mode == "act":
            # The norm is equal on all ranks but for the last bit, which another order of sums may change.
            outlier = self._anywhere(outlier)
        skipped = overflow | outlier
        self.checkpointer.maybe_wait_for_staging()
        # Undoes the loss scale and clips the norm to training.max_norm.
        divisor = scale / (self.job_config.training.max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        for optimizer in self.optimizers:
            # Fused AdamW divides gradients by the one as it reads them, and does nothing where the other is 1: no
            # pass over the gradients for clipping, no host sync for skipping.
            optimizer.grad_scale = divisor
            optimizer.found_inf = skipped.float()
        if self.scaling is not None:
            self.scaling.skipped = skipped
        self.optimizers.step()
        self.lr_schedulers.step()

        backs_off = self.job_config.fp8.loss_scale.enable
        bad = overflow
        if backs_off:
            # Where the loss scale can still fall, an overflow is its business; elsewhere it is a bad step.
            bad = overflow & (self._anywhere(~loss.isfinite()) | self.loss_scaler.at_minimum())
        self.watch.record(self.step, bad, loss, norms)
        ratio = self.loss_scaler.update(overflow)
        if backs_off and self.scaling is not None:
            self.scaling.rescale_gradients(ratio)

        average = None
        if shown:
            average = self._log(loss, local_tokens, tokens, text_bytes, grad_norm, lr)
        last = self.step == self.job_config.training.steps
        if shown or self.checkpointer._should_save(self.step, last_step=last):
            self.response.look(average)
            if self.response.rolls_back is None:
                self._stop_if_bad()

    def _compiles_observation(self) -> bool:
        """Whether to observe for the compiler's sake: so it has made both graphs by the third step of this process."""
        return self.step == self.first_step + 2 and not self.metrics_processor.should_log(self.step - 1)

    def _text_bytes(self, labels: torch.Tensor) -> torch.Tensor:
        return self.token_bytes[labels[labels != IGNORE_INDEX]].sum()

    def _anywhere(self, flag: torch.Tensor) -> torch.Tensor:
        """[] bool: true on any rank."""
        if not self.parallel_dims.dp_enabled:  # tensor-parallel ranks compute the same
            return flag
        number = flag.float()
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return number > 0

    def _gradients(self) -> list[torch.Tensor]:
        """This rank's part of every parameter's gradient, in the order of `self.parameters`."""
        grads = [parameter.grad for parameter in self.parameters.values()]
        return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]

    def _gradient_norms(self, grads: list[torch.Tensor]) -> torch.Tensor:
        """[P] float32: the norm of every parameter's whole gradient."""
        squares = torch.stack(torch._foreach_norm(grads, 2.0, dtype=torch.float32)).square()
        dims = self.parallel_dims
        if dims.tp_enabled:
            mesh = dims.get_mesh("tp")
            if mesh.get_local_rank():  # what every rank has whole counts once
                squares = torch.where(self.split, squares, 0.0)
            dist.all_reduce(squares, group=mesh.get_group())
        if dims.fsdp_enabled:
            dist.all_reduce(squares, group=dims.get_mesh("fsdp").get_group())
        return squares.sqrt()

    def _log(
        self,
        loss: torch.Tensor,
        local_tokens: Any,
        tokens: torch.Tensor,
        text_bytes: torch.Tensor,
        grad_norm: torch.Tensor,
        lr: float,
    ) -> float:
        """Reduce over ranks, copy to the host, hand to the metrics processor. Every rank calls it. Returns the mean loss."""
        average, largest = float(loss), float(loss)
        if self.parallel_dims.dp_cp_enabled:
            mesh = self.parallel_dims.get_optional_mesh("loss")
            average = dist_utils.dist_sum(loss, mesh)
            largest = dist_utils.dist_max(loss * tokens / local_tokens.to(self.device), mesh)
        outliers = int(self.response.gate.skipped)
        extra = {
            "n_tokens_seen": self.ntokens_seen * self._data_parallel_degree(),
            "lr": lr,
            "bits_per_byte": average * int(tokens) / math.log(2) / max(int(text_bytes), 1),
            "skipped_steps": int(self.watch.total) + outliers,
            "nonfinite_steps": int(self.watch.total),
        }
        if self.job_config.fp8.loss_scale.enable:
            extra["loss_scale"] = float(self.loss_scaler.scale)
            extra["skipped_steps"] = int(self.loss_scaler.skipped) + outliers  # bad steps are among them
        self.metrics_processor.log(self.step, average, largest, float(grad_norm), extra_metrics=extra)
        return average

    def _stop_if_bad(self) -> None:
        """Stop before anything is overwritten if more steps in a row were bad than allowed. The same on all ranks."""
        if int(self.watch.step) == 0:
            return
        allowed = self.job_config.stability.skip_nonfinite_steps
        what = self.watch.describe()
        if int(self.watch.longest) > allowed:
            state = self.scaling
            if state is not None:
                names = [
                    name for name, bad in zip(state.names, state.nonfinite_steps.tolist(), strict=True) if bad
                ]
                if names:
                    more = f" and {len(names) - 1} more" if names[1:] else ""
                    what += f" (FP8 tensors with a non-finite amax: {names[0]}{more})"
            raise NotFinite(
                f"{what}; weights were not updated and no checkpoint was written from it: look at that step's data, lower "
                f"optimizer.lr, or go on past such steps with --stability.skip_nonfinite_steps={allowed + 1}"
            )
        logger.warning(f"Skipped the optimizer: {what}")
        self.watch.forget()

    def should_continue_training(self) -> bool:
        self.response.roll_back()
        if not super().should_continue_training():
            return False
        if self.stop_request.due():
            self._stop_if_bad()
            self.stopped = True
            saved = self.started and self.checkpointer.save_now(self.step)
            logger.warning(self.stop_request.answer(self.step, saved))
        return not self.stopped

    def close(self) -> None:
        if hasattr(self, "stop_request"):
            self.stop_request.close()
        super().close()

    def train(self) -> None:
        super().train()
        if not self.started and not self.stopped:
            config = self.job_config
            raise UserError(
                f"{config.job.dump_folder} holds a finished run, step {self.step} of {config.training.steps}: train on with "
                f"--training.steps={2 * self.step}, or start anew with another --job.dump_folder"
            )

    def _data_parallel_degree(self) -> int:
        """How many ranks read tokens of their own; `ntokens_seen` is one rank's."""
        return self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard

    def state_dict(self) -> dict[str, Any]:
        tokens = self.ntokens_seen * self._data_parallel_degree()
        state = super().state_dict() | {
            "loss_scale": self.loss_scaler.state_dict(),
            "totals": {"tokens": tokens, "nonfinite_steps": self.watch.total},
            "monitor": self.metrics_processor.state_dict(),
        }
        return {name: value for name, value in state.items() if self.asked is None or name in self.asked}

    def prepare_to_load(self, names: Collection[str]) -> None:
        """The next `state_dict` asks only for what a checkpoint with these names holds: earlier ones hold less."""
        self.asked = {name.partition(".")[0] for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "loss_scale" in state_dict:
            self.loss_scale_change = self.loss_scaler.load_state_dict(state_dict["loss_scale"])
        if "totals" in state_dict:  # else the tokens are right at the checkpoint's number of ranks only
            self.ntokens_seen = state_dict["totals"]["tokens"] // self._data_parallel_degree()
            self.watch.total.copy_(state_dict["totals"]["nonfinite_steps"])
        if "monitor" in state_dict:
            self.metrics_processor.load_state_dict(state_dict["monitor"])
        self.asked = None


def _log_folder(config: Any) -> str:
    return os.path.normpath(os.path.join(config.job.dump_folder, "logs"))


def _log_to_file(config: Any) -> None:
    """Keep what every rank says in <dump_folder>/logs/rank<n>.log, beside the console."""
    os.makedirs(_log_folder(config), exist_ok=True)
    handler = logging.FileHandler(os.path.join(_log_folder(config), f"rank{os.environ.get('RANK', 0)}.log"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)


def _report(error: UserError) -> None:
    """One line on stderr, and for run_train.sh, which prints the first rank's again below torchrun's own report."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    path = os.environ.get("TITAN_FP8_ERROR_FILE")
    if path and not os.path.getsize(path):
        with open(path, "a") as file:
            file.write(f"{error}\n")


def main() -> int:
    """Train as the command line says. Exit status 0; 2 after an error the user can mend; 3 if it is not finite."""
    die_with_launcher(LAUNCHER)
    told = os.environ.get("TITAN_FP8_ERROR_FILE")
    if told and os.path.getsize(told) and restarted():  # such an error does not pass by itself
        return 2
    try:
        config = load_config(sys.argv[1:])
        init_logger()
        try:
            if os.environ.get("RANK", "0") == "0":
                claim(Path(config.job.dump_folder))
            _log_to_file(config)
        except OSError as error:
            raise UserError(
                f"job.dump_folder must be a folder that can be written, got {config.job.dump_folder}: {error.strerror} "
                f"({error.filename}); choose another --job.dump_folder"
            ) from error
        trainer = Trainer(config)
        results: list[str] = []
        try:
            if config.checkpoint.create_seed_checkpoint:
                trainer.checkpointer.save(curr_step=0, last_step=True)
            else:
                trainer.train()
                results = trainer.metrics_processor.summary()
        finally:
            trainer.close()
        if dist.get_rank() == 0:
            print(*results, sep="\n", flush=True)
        dist.destroy_process_group()
    except UserError as error:
        _report(error)
        return error.status
    except BrokenPipeError:  # --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
