"""The command line: ``interp-rlhf demo | fit | measure | compare | verify | report | doctor``. Recipes train.

Exit codes: 0 fine, 1 a check failed, 2 bad input (one line on standard error, no traceback).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from interp_rlhf import __version__
from interp_rlhf.errors import InterpError

FINE, CHECK_FAILED, BAD_INPUT = 0, 1, 2


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code.

    Args:
        arguments: the words after the program's name; the process's own where left out.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.verb(options)
    except InterpError as error:
        print(f"interp-rlhf: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="interp-rlhf", description="What preference training did inside the model.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    demo = verbs.add_parser("demo", help="train a tiny model organism with TRL, attached, and report")
    demo.add_argument("--trainer", choices=("dpo", "ppo", "grpo"), default="dpo")
    demo.add_argument("--out", type=Path, metavar="DIR", help="where the run goes (default: demo/TRAINER)")
    demo.add_argument("--seed", type=int, default=0, metavar="N")
    demo.add_argument("--controls", type=int, default=0, metavar="K", help="also train K control runs (default: none)")
    demo.set_defaults(verb=_demo)
    _add_fit(verbs)
    _add_measure(verbs)
    _add_compare(verbs)

    verify = verbs.add_parser("verify", help="check a run's snapshots, their chain and the checkpoints they name")
    verify.add_argument("run", type=Path, metavar="RUN", help="the trainer's output folder")
    verify.add_argument("--head", metavar="HASH", help="a head noted earlier: also tell whether the end was cut off")
    verify.set_defaults(verb=_verify)

    report = verbs.add_parser("report", help="write a run as one self-contained HTML page")
    report.add_argument("run", type=Path, metavar="RUN", help="the trainer's output folder")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/interp/report.html")
    report.add_argument("--texts", action="store_true", help="include prompt and completion texts")
    report.set_defaults(verb=_report)

    doctor = verbs.add_parser("doctor", help="what is installed, what is missing and what that costs")
    doctor.add_argument("--model", type=Path, metavar="PATH", help="a local model: print its hookpoints")
    doctor.set_defaults(verb=_doctor)
    return parser


def _add_fit(verbs: Any) -> None:
    fit = verbs.add_parser("fit", help="fit a probe, a direction or a dictionary of features on a saved model")
    kinds = fit.add_subparsers(dest="kind", required=True)
    for kind in ("probe", "direction"):
        one = kinds.add_parser(kind, help=f"a {kind} on contrast pairs, labelled texts or a concept pack")
        _add_fit_common(one, "FILE")
        texts = one.add_mutually_exclusive_group(required=True)
        texts.add_argument("--pairs", type=Path, metavar="FILE", help="JSON lines with prompt, chosen, rejected")
        texts.add_argument(
            "--labels", type=Path, metavar="FILE", help="JSON lines with a text and a label, true or false"
        )
        texts.add_argument("--pack", metavar="NAME", help="a packaged concept pack, or the path of one")
        one.add_argument("--tokens", choices=("completion", "prompt", "all"), default="completion")
        one.add_argument("--folds", type=int, default=5, metavar="K")
        one.add_argument("--fpr", type=float, default=0.2, metavar="RATE", help="false-positive rate of the threshold")
        one.set_defaults(verb=_fit)
    sae = kinds.add_parser("sae", help="a sparse autoencoder on the activations of texts (extra 'sae')")
    _add_fit_common(sae, "DIR")
    sae.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines of texts or preference pairs")
    sae.add_argument("--width", type=int, required=True, metavar="F", help="number of features")
    sae.add_argument("--architecture", choices=("topk", "batchtopk", "standard", "jumprelu", "gated"), default="topk")
    sae.add_argument("--k", type=int, default=32, metavar="K", help="features per token of topk and batchtopk")
    sae.add_argument("--sparsity", type=float, default=1.0, metavar="C", help="penalty on activity of the others")
    sae.add_argument("--train-tokens", type=int, default=2_000_000, metavar="N", help="tokens to train on")
    sae.add_argument("--batch", type=int, default=1024, metavar="N", help="tokens per step")
    sae.add_argument("--lr", type=float, default=3e-4, metavar="RATE")
    sae.set_defaults(verb=_fit_sae)


def _add_fit_common(one: Any, out: str) -> None:
    one.add_argument("--model", type=Path, required=True, metavar="DIR", help="a saved model or PEFT adapter")
    one.add_argument("--hookpoint", required=True, metavar="NAME", help="for example layers.50%%.resid_post")
    one.add_argument("--out", type=Path, required=True, metavar=out)
    one.add_argument("--name", metavar="NAME", help="of what is fitted (default: the pack's or the file's)")
    one.add_argument("--base", type=Path, metavar="DIR", help="the model that an adapter is put on")
    one.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the model's")
    one.add_argument("--max-length", type=int, default=512, metavar="N", help="tokens kept per text")
    one.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts per forward pass")
    one.add_argument("--seed", type=int, default=0, metavar="N")


def _add_measure(verbs: Any) -> None:
    measure = verbs.add_parser("measure", help="measure a checkpoint against its run's start, or against a base model")
    measure.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a saved model or PEFT adapter")
    measure.add_argument("--run", type=Path, metavar="RUN", help="output folder of the attached run it belongs to")
    measure.add_argument("--out", type=Path, metavar="DIR", help="write a complete run there (report, verify)")
    measure.add_argument("--step", type=int, metavar="N", help="the checkpoint's step, where its folder does not tell")
    measure.add_argument("--base", type=Path, metavar="DIR", help="the model to compare with")
    _add_texts(measure)
    measure.set_defaults(verb=_measure)


def _add_compare(verbs: Any) -> None:
    compare = verbs.add_parser("compare", help="runs, models and checkpoints side by side; the first is the start")
    compare.add_argument("places", type=Path, nargs="+", metavar="PLACE", help="output folder of a run, or a model")
    compare.add_argument("--controls", type=Path, nargs="+", default=(), metavar="PLACE", help="control runs")
    _add_texts(compare)
    compare.set_defaults(verb=_compare)


def _add_texts(verb: Any) -> None:
    verb.add_argument("--config", type=Path, metavar="FILE", help="the interp: block (default: observe)")
    verb.add_argument("--data", type=Path, metavar="FILE", help="JSON lines of prompts or preference pairs")


def _fit(options: argparse.Namespace) -> int:
    from interp_rlhf.fitting import FitOptions, fit_direction, fit_probe_file

    names = ("hookpoint", "pairs", "labels", "pack", "name", "tokenizer", "base", "tokens", "max_length", "batch_size")
    settings = FitOptions(**{name: getattr(options, name) for name in (*names, "folds", "fpr", "seed")})
    work = fit_probe_file if options.kind == "probe" else fit_direction
    print(work(options.model, options.out, settings))
    return FINE


def _fit_sae(options: argparse.Namespace) -> int:
    from interp_rlhf.sae_training import SaeOptions, fit_sae

    names = ("hookpoint", "data", "width", "architecture", "k", "sparsity", "batch", "lr", "name", "tokenizer", "base")
    settings = {name: getattr(options, name) for name in (*names, "max_length", "batch_size", "seed")}
    print(fit_sae(options.model, options.out, SaeOptions(**settings, tokens=options.train_tokens)))
    return FINE


def _measure(options: argparse.Namespace) -> int:
    from interp_rlhf.offline import measure_command

    names = ("run", "base", "config", "data", "out", "step")
    print(measure_command(options.checkpoint, **{name: getattr(options, name) for name in names}))
    return FINE


def _compare(options: argparse.Namespace) -> int:
    from interp_rlhf.comparison import compare_command

    print(compare_command(options.places, controls=options.controls, config=options.config, data=options.data))
    return FINE


def _demo(options: argparse.Namespace) -> int:
    from interp_rlhf.demo import run_demo

    run_demo(
        options.trainer, options.out or Path("demo") / options.trainer, seed=options.seed, controls=options.controls
    )
    return FINE


def _verify(options: argparse.Namespace) -> int:
    from interp_rlhf.audit.verification import render, verify_run

    result = verify_run(options.run, head=options.head)
    print(render(result))
    return FINE if result.ok else CHECK_FAILED


def _report(options: argparse.Namespace) -> int:
    from interp_rlhf.audit.store import load_run
    from interp_rlhf.report.html import write_report

    run = load_run(options.run)
    print(write_report(run, options.out or run.path / "report.html", texts=options.texts))
    return FINE


def _doctor(options: argparse.Namespace) -> int:
    from interp_rlhf.doctor import describe_model, examine, render

    findings = examine()
    print(render(findings))
    if options.model is not None:
        print(describe_model(options.model))
    return CHECK_FAILED if any(finding.state == "broken" for finding in findings) else FINE


if __name__ == "__main__":
    raise SystemExit(main())
