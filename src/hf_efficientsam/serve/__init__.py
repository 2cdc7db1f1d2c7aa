"""The HTTP API: `efficientsam serve`. Needs fastapi and uvicorn, which `hf-efficientsam[serve]` brings."""
