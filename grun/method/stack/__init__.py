"""Many requests on one model, and the folder that holds them."""
