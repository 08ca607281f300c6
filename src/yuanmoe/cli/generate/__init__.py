"""`yuanmoe generate` and `yuanmoe chat`: options, answers on a terminal, conversations, experts in colour."""
