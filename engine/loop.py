"""The life of a run: steps, and when to log, validate, save and stop."""

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack

from engine.batches import count_step
from engine.build import Run, build
from engine.config import JobConfig, check
from engine.data.config import CHAT_FORMATS
from engine.data.tokenizer import CHAT_TEMPLATE_FILE
from engine.distributed import (
    choose_device,
    launched_rank,
    launched_world_size,
    process_group,
    seed_everything,
    shorten_timeouts,
)
from engine.evaluate import Validation, evaluate
from engine.health import GarbageCollector, SignalWatcher
from engine.logging import Output, environment_report, start_logging
from engine.memory import MemoryWatch
from engine.metrics import perplexity
from engine.peft_export import is_exported
from engine.profiling import Profiler
from engine.run_folder import Difference, RunFolder, unwritable
from engine.schedule import lr_factor, set_learning_rate, shortening
from engine.schema import flatten
from engine.step import StepReport, train_step
from engine.trackers import Trackers, build_trackers

log = logging.getLogger("tessera")


def fit(config: JobConfig) -> None:
    """Train as `config` says, from where its run folder left off. Every rank calls this.

    SIGTERM or SIGUSR1 on any rank ends it after the current step, with a checkpoint.
    """
    check(config, launched_world_size())
    folder = RunFolder.of(config)
    if (finished := folder.finished_step(config)) is not None:
        print(
            f"This run is finished: step {finished} in {folder.checkpoints} holds the model alone "
            "(checkpoint.last_save_model_only). To train it on from the last full step, set "
            "checkpoint.load_step; scripts/convert_dcp_to_hf.py makes a Hugging Face folder of it"
        )
        return
    differences = folder.check_reuse(config, launched_world_size())
    with ExitStack() as stack:
        output = _open_output(config, folder)
        stack.callback(output.close)
        stack.push(output.record)
        device = choose_device(config.job.device)
        signals = stack.enter_context(SignalWatcher())
        world = stack.enter_context(process_group(config.comm, device, folder.path))
        if world.rank == 0:  # every rank is past check_reuse once the process group stands
            _open_folder(config, folder, differences)
        seed_everything(config.debug)
        run = build(config, world, folder)
        stack.callback(run.checkpointer.close)
        if config.validation.only:
            _validate(run)
            return
        if config.checkpoint.create_seed_checkpoint:
            if folder.holds_checkpoints():
                raise ValueError(
                    f"checkpoint.create_seed_checkpoint = true, but {folder.checkpoints} holds "
                    "steps already; give another job.dump_folder"
                )
            run.checkpointer.save(0, run.state)
            run.checkpointer.wait()
            return
        trackers = build_trackers(
            config.metrics,
            folder.path,
            rank=world.rank,
            total_steps=config.training.steps,
            resume_step=int(run.state.counters["step"]),
            settings=flatten(config),
            show=output.show,
        )
        stack.callback(trackers.close)
        _train(run, trackers, signals)
        trackers.close()
        if world.rank == 0:
            _say_what_next(run)


def _open_output(config: JobConfig, folder: RunFolder) -> Output:
    try:
        return start_logging(
            rank=launched_rank(),
            folder=folder.logs,
            use_color=not config.metrics.disable_color_printing,
        )
    except OSError as error:
        raise unwritable(config, error) from error


def _open_folder(config: JobConfig, folder: RunFolder, differences: list[Difference]) -> None:
    """Say how this run differs from the one before it in the folder; write its configuration."""
    log.info("%s, in %s", config.job.description, folder.path)
    present = {k: v for k, v in environment_report().items() if v not in ("none", "not installed")}
    log.info("%s", ", ".join(f"{name} {version}" for name, version in present.items()))
    if differences:
        shown = "".join(f"\n  {difference}" for difference in differences)
        log.warning("%s holds another configuration; what changes:%s", folder.path, shown)
    if not config.validation.only:
        folder.write_config(config, launched_world_size())


def _train(run: Run, trackers: Trackers, signals: SignalWatcher) -> None:
    config, counters = run.config, run.state.counters
    steps, first_step = config.training.steps, int(counters["step"]) + 1
    if note := shortening(config.lr_scheduler, steps):
        log.warning("%s", note)
    if first_step > steps:
        log.info("all %d steps of this run are done; raise training.steps to go on", steps)
        run.checkpointer.make_up_export(run.state)
    profiler = Profiler(
        config.profiling,
        run.folder.profile,
        rank=run.world.rank,
        device_type=run.world.device.type,
        start_step=first_step - 1,
    )
    garbage = GarbageCollector(config.training.gc_freq, debug=config.training.gc_debug)
    memory = MemoryWatch(run.trainer.model, run.trainer.optimizer, run.world.device)
    meter = run.meter
    meter.start()
    with profiler, garbage, run.stalls:
        for step in range(first_step, steps + 1):
            row = _take_step(run, step, memory)
            if step == first_step:
                shorten_timeouts(config.comm)
                with meter.apart("starting"):
                    run.checkpointer.reserve(run.state)
            if _should_validate(config, step) and row is not None:
                with meter.apart("validating"):
                    row |= _validation_row(_validate(run))
            if row is None:
                trackers.advance(step)
            else:
                trackers.write(step, row)
            with meter.apart("profiling"):
                profiler.after_step()
            garbage.after_step(step)
            stopping = signals.should_stop(run.world.any_rank)
            if stopping or run.checkpointer.should_save(step, last=step == steps):
                _save(run, step, last=step == steps)
            if stopping:
                if not config.checkpoint.enable:
                    log.warning("checkpoint.enable = false: nothing of this run was saved")
                break
    with meter.apart("saving"):
        run.checkpointer.wait()
    log.info("%s", meter.wall.describe())


def _save(run: Run, step: int, *, last: bool) -> None:
    """Save, and say how long training stood still for it; nothing where saving is off."""
    started = time.perf_counter()
    with run.meter.apart("saving"):
        run.checkpointer.save(step, run.state, last=last)
    config = run.config.checkpoint
    if config.enable and not config.load_only:
        log.info("step %d: saving held training up for %.2f s", step, time.perf_counter() - started)


def _take_step(run: Run, step: int, memory: MemoryWatch) -> dict[str, float | None] | None:
    """Run one update; return its row of numbers where one is due."""
    config, counters, meter = run.config, run.state.counters, run.meter
    steps = config.training.steps
    factor = lr_factor(step, config.lr_scheduler, steps)
    set_learning_rate(run.trainer.optimizer, factor)
    with memory.watching(), meter.wall.spent("training"):
        report = train_step(run.trainer, step)
    meter.finish_step(
        step,
        tokens=report.tokens,
        trained_tokens=report.trained_tokens,
        squared_document_tokens=report.squared_document_tokens,
        rows=report.rows,
    )
    count_step(
        counters,
        step,
        rows=run.trainer.rows_per_step,
        tokens=report.tokens,
        trained_tokens=report.trained_tokens,
        sources=report.sources,
    )
    if not config.metrics.is_due(step, steps) and not _should_validate(config, step):
        return None
    return meter.report(
        step,
        loss=report.loss,
        grad_norm=report.grad_norm,
        lr=config.optimizer.lr * factor,
        extra={
            **objective_row(report.metrics),
            **run.stalls.take(),
            **memory.take(),
            "skipped_steps": run.trainer.nonfinite.num_skipped_steps,
            **_source_row(run, report),
        },
    )


def objective_row(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the metrics of an objective; the perplexity is that of its NLL, not of its loss.

    There is none in a step whose rows hold no answer that the NLL counts.
    """
    if "nll" not in metrics:
        return dict(metrics)
    nll = metrics["nll"]
    return {"perplexity": None if nll is None else perplexity(nll), **metrics}


def _source_row(run: Run, report: StepReport) -> dict[str, float | None]:
    """Return the numbers of each source where the run mixes several; nothing else does."""
    counters = run.state.counters
    if not report.sources or run.mixture is None:
        return {}
    epochs = run.mixture.epochs_read(int(counters["rows_consumed"]))
    return {
        **{f"loss/{name}": source.loss for name, source in report.sources.items()},
        **{f"tokens/{name}": counters[f"tokens/{name}"] for name in report.sources},
        **{f"epochs/{name}": epochs[name] for name in report.sources},
    }


def _validation_row(result: Validation) -> dict[str, float | None]:
    losses = {f"validation_loss/{name}": loss for name, loss in result.losses.items()}
    told = {f"validation_{name}": value for name, value in result.metrics.items()}
    return {"validation_loss": result.loss, **losses, **told}


def _should_validate(config: JobConfig, step: int) -> bool:
    validation = config.validation
    is_last = step == config.training.steps
    return validation.enable and (is_last or step % validation.freq == 0)


def _validate(run: Run) -> Validation:
    assert run.validation is not None, "validation data was opened where validation is asked for"
    trainer = run.trainer
    result = evaluate(
        trainer.model,
        trainer.objective,
        run.validation,
        trainer.dims,
        trainer.device,
        run.validation_names,
        trainer.reference,
    )
    log.info(
        "validation loss %.4f over %s tokens in %.1f s",
        result.loss,
        f"{result.tokens:,}",
        result.seconds,
    )
    for name, loss in result.losses.items():
        log.info("validation loss of %s: %s", name, "none" if loss is None else f"{loss:.4f}")
    return result


def _say_what_next(run: Run) -> None:
    """Print how to resume, look and generate; rank 0 only."""
    config, folder = run.config, run.folder
    step = int(run.state.counters["step"])
    print(f"\nStopped after step {step} of {config.training.steps}. Everything is in {folder.path}")
    if config.checkpoint.enable and not config.checkpoint.load_only:
        command = f"train.py --job.config_file {folder.config}"
        print(f"  go on:       torchrun --nproc_per_node={run.world.size} {command}")
    if config.metrics.enable_tensorboard:
        print(f"  curves:      tensorboard --logdir {folder.path / config.metrics.save_tb_folder}")
    adapters, in_hf = config.adapter.specs, config.checkpoint.initial_load_in_hf
    only_adapters = bool(adapters) and not config.adapter.merge_export
    is_usable = not only_adapters or (len(adapters) == 1 and in_hf)
    if is_usable and is_exported(folder.hf, only_adapters=only_adapters):
        asked = '--prompt "def "'
        if config.data.format in CHAT_FORMATS and (folder.hf / CHAT_TEMPLATE_FILE).is_file():
            asked = '--chat --prompt "What does os.walk do?"'
        print(f"  complete:    python scripts/generate.py --model {folder.hf} {asked}")
