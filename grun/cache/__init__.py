"""The engine that runs only what an edit can change, and the cache of the rest.

    rows -> prefix.Freezer -> shard.Shard -> store.PrefixStore (in memory, or in files: folder)
                |                                |
                | one pass for each              | frozen rows: states, keys and values, log-probabilities
                v                                v
       packed.PackedModel <- suffix.SuffixRunner <- cached.CachedEngine -> losses and gradients
       passes of the base    blocks above the first edit, edits included

An edit changes hidden states at one block or more, and the base model is frozen. What lies below the first edited block
is therefore the same in every step, and so are, above it, the keys and values of the tokens before the first edited
one. `prefix` computes all this once for each row; `store` keeps it in memory or in files below `cache.dir` (`folder`),
under an identity of everything that decides it (`weights`), so that other runs find it. Rows go through the blocks a
stretch at a time (`passage`), so that many may wait for a block that is read from its file. A step then runs the
blocks above the first edit on the last prompt token and the answer alone (`suffix`); where gates read every token, on
whole rows. `step` lays a step out before it comes, so that nothing waits for the host: its rows are taken by index
where they fit on the device (`resident`), and else copied while the step before is computed (`ahead`). `packed` makes
passes of any range of blocks over rows of any length without padding, by transformers' own modules with another
attention (`attention`), on a GPU with fewer launches for norms and rotations (`fused`). `cached` puts this together as
an engine whose losses and gradients are those of the plain one. `engine` compares the two on the longest rows before
training, and lets the plain one stay where they differ. For methods that change weights, where no part of a pass is
constant, `reference` keeps what the untouched model gives, by the same store. `gate_pretraining` fits gates on the
frozen states before the first step.
"""
