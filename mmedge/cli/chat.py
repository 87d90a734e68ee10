"""`mmedge chat`: a conversation with a generator in the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mmedge.cli.options import BackendOption, BundleArgument, DeviceOption, PrecisionOption

if TYPE_CHECKING:
    from mmedge.models.conversation import Conversation

__all__ = ["chat"]

_HELP = """\
/help   this list
/reset  forget the conversation
/exit   end it, as the end of the input does
Anything else is said to the model; Ctrl-C ends its reply."""


def chat(  # noqa: PLR0913, PLR0917, one parameter an option
    bundle: BundleArgument,
    system: Annotated[str | None, typer.Option(help="System message.", show_default="none")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Length of a reply, in tokens.", show_default="up to 128"),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=100.0, help="Above 0, draw tokens; 0 is greedy.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the most likely tokens of this sum.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Random seed.", show_default="a new one")
    ] = None,
    precision: PrecisionOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
) -> None:
    """Talk with a model that has a chat template. /help lists what can be typed."""
    from mmedge.errors import InputError
    from mmedge.generation import GenerationOptions
    from mmedge.models.conversation import Conversation
    from mmedge.models.generator import Generator

    if sys.stdin is None:  # closed by the shell: <&-
        raise InputError(
            "Input: it is closed, expected lines to say. Leave it open, or pass a file: < lines.txt"
        )
    options = GenerationOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    with (
        Generator.load(bundle, device=device, precision=precision, backend=backend) as model,
        Conversation(model, system=system, options=options) as conversation,
    ):
        _talk(conversation)


def _talk(conversation: Conversation) -> None:
    """Read lines and print replies until the input ends."""
    from mmedge.cli.output import print_error, print_pieces
    from mmedge.errors import InputError

    typed = sys.stdin.isatty()
    while True:
        if typed:
            sys.stdout.write("> ")
            sys.stdout.flush()
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise InputError(
                f"Input: not {error.encoding} at byte {error.start}. Convert it to that encoding."
            ) from error
        said = line.strip()
        if not line or said == "/exit":
            return
        if said == "/help":
            typer.echo(_HELP)
        elif said == "/reset":
            conversation.reset()
        elif said.startswith("/"):
            print_error(f"{said.split()[0]} is no command. /help lists them.")
        elif said:
            pieces = conversation.stream(said)
            try:
                print_pieces(pieces)
            except KeyboardInterrupt:
                pieces.close()
            except InputError as error:
                if not typed:
                    raise
                print_error(str(error))
            typer.echo("")
