"""The Space: the web demo of hf_efficientsam on its bundled checkpoint, or on what the Space's variables name."""

import os

from hf_efficientsam.demo.page import launch_demo
from hf_efficientsam.demo.service import Demo

if __name__ == "__main__":
    demo = Demo(
        model=os.environ.get("EFFICIENTSAM_MODEL"),
        detector=os.environ.get("EFFICIENTSAM_DETECTOR"),
        saliency=os.environ.get("EFFICIENTSAM_SALIENCY"),
    )
    launch_demo(demo, host="0.0.0.0", port=7860)
