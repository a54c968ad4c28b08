"""``python -m peft_arena`` is the ``peft-arena`` command."""

from peft_arena.cli.app import main

if __name__ == "__main__":
    main()
