"""The web demo: `efficientsam demo` and the Space in `spaces/`. Needs gradio, which `hf-efficientsam[demo]` brings."""
