"""Python runs this at its start, where this folder is on PYTHONPATH.

Commands that a test starts then have the tiny trunk in ResNet-18's place, as the test itself has.
"""

from reidnb.parts.backbones import tiny_trunk

tiny_trunk().start()
