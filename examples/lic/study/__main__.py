import sys

from examples.lic.study.cli import main

if __name__ == "__main__":
    sys.exit(main())
