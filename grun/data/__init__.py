"""Where rows of questions and answers come from: data sets, files of the user, the generated demo corpus."""
