"""The web UIs run this at every start. All that steering needs comes with them, so nothing is installed."""

import importlib.util

NEEDED = ("torch", "numpy", "safetensors", "PIL")

if __name__ == "__main__":
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"Concept Steer: this Python has no {', '.join(missing)}; reinstall the web UI's requirements.")
