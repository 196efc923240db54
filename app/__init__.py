"""The Serve application: dialects at the edge, one engine per model replica behind them, Ray Serve in between."""
