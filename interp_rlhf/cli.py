"""The command line: ``interp-rlhf demo | verify | report | doctor``. Training itself stays in recipe scripts.

Exit codes: 0 fine, 1 a check failed, 2 bad input (one line on standard error, no traceback).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

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
    demo.set_defaults(verb=_demo)

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


def _demo(options: argparse.Namespace) -> int:
    from interp_rlhf.demo import run_demo

    run_demo(options.trainer, options.out or Path("demo") / options.trainer, seed=options.seed)
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
