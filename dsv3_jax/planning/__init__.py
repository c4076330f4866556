"""What a model costs, where it fits and how fast it will be: counted on the model, priced with hardware sheets."""
