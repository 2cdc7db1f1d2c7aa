"""
`efficientsam demo` whose searches and downloads wait, once they have shown how far they are, as long as there is the
file that GATE names. So a test that looks at what is shown meanwhile does not depend on how fast they are.
"""

import os
import time
from pathlib import Path

from hf_efficientsam.cli.app import app
from hf_efficientsam.demo.service import Demo

GATE = Path(os.environ["GATE"])
reporter = Demo.reporter


def waiting_reporter(*arguments):
    report = reporter(*arguments)

    def report_and_wait(ratio):
        report(ratio)
        while ratio > 0 and GATE.exists():
            time.sleep(0.02)

    return report_and_wait


Demo.reporter = waiting_reporter
app()
