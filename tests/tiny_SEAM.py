"""SEAM at a sixteenth of the width (0.4 million parameters): tests of the scripts ask what they do, not how well."""
from network.resnet38d import Net as ResNet38
from network.seam import SEAMHead


class Backbone(ResNet38):
    def __init__(self):
        super().__init__(width=4)


class Net(SEAMHead, Backbone):
    """See `SEAMHead`."""
