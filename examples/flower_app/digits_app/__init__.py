"""An ordinary Flower app: Flower's ServerApp and ClientApp, one of fedveil's strategies."""
