"""Where the command `lmeff` begins: the command line; where it cannot be imported, what is wrong with the packages."""

import sys


def main() -> int:
    """Runs a command and gives its exit code: 1 where packages are missing or do not go together."""
    try:
        from lmeff.cli import main as command_line
    except Exception as error:  # JAX refuses a jaxlib of another version with a RuntimeError
        from lmeff.doctor.packages import diagnosis

        print(diagnosis(error), file=sys.stderr)
        return 1
    return command_line()


if __name__ == "__main__":
    sys.exit(main())
