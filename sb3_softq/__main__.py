"""``python -m sb3_softq train ...`` is the command ``rl-zoo3 train ...``."""

from sb3_softq.zoo.cli import main

if __name__ == "__main__":
    main()
