"""The one exception that means "your input is wrong"."""


class InputError(ValueError):
    """Bad usage or bad input.

    The message is one line that names the file, key or value and says how to mend it.
    The command line prints it and exits with code 2; any other exception is a defect of ours.
    """
