"""Problems: mixtures of in-context tasks that the models of the lab learn, one file each."""
