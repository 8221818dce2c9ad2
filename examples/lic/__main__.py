import sys

from examples.lic.demo import main

if __name__ == "__main__":
    sys.exit(main())
