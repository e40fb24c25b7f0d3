"""``python -m lorkd_monai``: the command line."""

from lorkd_monai.cli import main

if __name__ == "__main__":
    main()
