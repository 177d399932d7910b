"""Play with a generator on a page: the picture follows the sliders.

One chooses a class, CFG strength, seeds and styles, and sees a grid at once. What is
saved holds its settings, and can be opened again. The page is for this machine alone
(127.0.0.1) and fetches nothing. It needs Gradio: pip install -c constraints.txt -e '.[demo]'

examples:
  drift demo
  drift demo outputs/exported --class "golden retriever" --port 8000
  drift demo --rev main                       the generator of another Git revision
  drift demo imported/latent_L --vae stabilityai/sd-vae-ft-mse --weights ema_0999
"""

import argparse
import errno
import os
import socket
import tempfile
import time

from drift.cli.options import add_drawing, class_number, find_source, usable_device
from drift.runtime.errors import UserError

_HOST = "127.0.0.1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_drawing(parser)
    parser.add_argument("--class", dest="label", metavar="CLASS", default=0, help="shown first (0)")
    parser.add_argument("--port", type=int, default=7860, help="(%(default)s)")


def run(args: argparse.Namespace) -> None:
    _check_port(args.port)
    with tempfile.TemporaryDirectory(prefix="drift-demo-") as cache:
        # Gradio reads these when it is imported
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": cache}
        for name in ("NO_PROXY", "no_proxy"):  # Gradio calls itself
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), _HOST]))
        try:
            from drift.interop.demo import build
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            raise UserError("drift demo needs Gradio: pip install -c constraints.txt -e '.[demo]'") from None
        from drift.interop.pipeline import DriftPipeline, open_copies

        source = find_source(args.source, args.rev)
        versions = {"vae": args.vae, "variant": args.weights, "revision": args.revision}
        pipe = DriftPipeline.from_pretrained(source, **versions).to(usable_device(args.device))
        copies = open_copies(source, first=args.weights, revision=args.revision)
        page = build(pipe, copies, class_number(pipe, args.label))
        _serve(page, args.port)


def _serve(page, port: int) -> None:
    """Until Ctrl-C."""
    try:
        _, url, _ = page.launch(
            server_name=_HOST,
            server_port=port,
            share=False,
            quiet=True,
            ssr_mode=False,
            prevent_thread_lock=True,
            footer_links=[],
        )
    except OSError as error:
        raise UserError(f"--port {port}: {error}") from None
    print(f"{url}    Ctrl-C ends it", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        page.close(verbose=False)


def _check_port(port: int) -> None:
    """Before the generator is loaded; Gradio's own message is of several lines."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((_HOST, port))
    except (OSError, OverflowError) as error:
        in_use = getattr(error, "errno", 0) == errno.EADDRINUSE
        reason = "is in use" if in_use else str(error).lower().rstrip(".")
        raise UserError(f"--port {port}: {reason}; name another") from None
