"""English wordings of the questions. `wordings.py` says what the names in braces stand for."""

IMAGES = {
    "none": ("this ultrasound exam", "the ultrasound exam at hand"),
    "one": (
        "this ultrasound image",
        "this sonogram",
        "the attached ultrasound view",
        "the ultrasound frame above",
        "this single ultrasound view",
    ),
    "many": (
        "these ultrasound images",
        "this set of sonograms",
        "the {n} attached ultrasound views",
        "the {n} sonograms of one exam",
        "this series of ultrasound views",
    ),
    "loop": (
        "this ultrasound cine loop",
        "this ultrasound clip",
        "the attached moving sonogram",
        "the cine sequence above",
    ),
    "mixed": (
        "these ultrasound stills and clips",
        "the {n} attached images and loops of one exam",
        "this exam's still and moving sonograms",
    ),
}

SYSTEM = (
    "You read ultrasound for a reporting room and write only what can be seen.",
    "You draft ultrasound reports; a physician checks and signs them.",
    "You help sonographers put their images into words.",
    "You know breast, thyroid, liver, kidney, gynaecological, cardiac and vascular ultrasound.",
    "Answer as a resident in ultrasound would: precise terms, no guesses.",
    "Your job is to look at sonograms and answer what is asked about them.",
    "You give reading support to an ultrasound department and say so where something is unclear.",
    "You were trained in sonography. Keep answers short and tied to the image.",
    "You pay attention to echogenicity, margins, shape and what happens behind a lesion.",
    "Go by the image. Signs that it does not show are not to be mentioned.",
    "You read along with a sonologist; use the vocabulary of the field.",
    "You check whether ultrasound images and their texts belong together.",
    "You teach ultrasound at a university hospital; be clear and exact.",
    "Follow the customs of ultrasound reporting in your answers.",
    "You interpret ultrasound images; your output is meant for physicians.",
    "You are the reading assistant of an ultrasound clinic.",
)

REPORT = (
    "Read {images} and write the report: findings first, then the impression.",
    "Draft a report on {images} with one section for findings and one for the impression.",
    "What would a full report on {images} say? Give both its sections.",
    "The scan is done; here is its material, {images}. Complete findings and impression.",
    "Write up {images} as a two-part report.",
    "For {images}, record what is seen and conclude with an impression.",
    "Fill in both fields of the report form, findings and impression, from {images}.",
    "Turn {images} into a report that is ready for signature.",
    "Report on {images}. Observations go under findings, the conclusion under impression.",
    "Take {images} and compose the written report in two headed sections.",
    "Prepare the report that goes with {images}; neither findings nor impression may be missing.",
    "Put {images} into words as a complete ultrasound report.",
    "Dictate the report for {images}, with what you see and what you make of it.",
    "On the basis of {images}, set out findings and then an impression.",
    "Have a look at {images} and write the whole report.",
    "Compose findings and impression for {images}, in that order.",
)

FINDINGS = (
    "Write the findings section for {images} and leave the impression out.",
    "Record the appearances in {images}, without a diagnosis.",
    "Only the findings field is needed. Your source: {images}.",
    "Set down the sonographic appearances in {images}; conclusions come later.",
    "Which structures and abnormalities appear in {images}? Word it as findings.",
    "Go through {images} and note echogenicity, shape, margins and so on.",
    "Draft the findings for {images}; a colleague will add the impression.",
    "Stick to description: what is there in {images}?",
    "How should the findings for {images} read?",
    "From {images}, write one findings paragraph in standard terms.",
    "Note down the objective appearances in {images}.",
    "Look at {images} and dictate the findings, nothing further.",
    "Document {images} the way a findings section does.",
    "Summarise the sonographic features in {images}, stopping short of a conclusion.",
)

IMPRESSION = (
    "Give the impression for {images} and skip the findings.",
    "What is your conclusion from {images}? One or two sentences.",
    "Fill in the impression field only, going by {images}.",
    "The findings are written already. Add the impression for {images}.",
    "Conclude: which diagnosis or state follows from {images}?",
    "Sum {images} up in the words that end a report.",
    "No description, please: just the impression drawn from {images}.",
    "How should the impression for {images} read?",
    "Having read {images}, state your impression.",
    "Word a brief impression that fits {images}.",
    "The last section of the report is still empty. Write it from {images}.",
    "In report style, say what follows from {images} for the diagnosis.",
    "From {images}, the conclusion alone, concisely.",
    "Close the report on {images} with its impression.",
)

CAPTION = (
    "Say in a few sentences what is visible in {images}.",
    "Write a caption for {images}.",
    "What can be seen in {images}? A short passage will do.",
    "Explain the contents of {images} in running text.",
    "Introduce {images} to a colleague who is without a screen.",
    "Describe the region and the appearances in {images}.",
    "If {images} went into an atlas, what would the legend say?",
    "Put what is visible in {images} into plain sentences.",
    "Give an overall account of {images}.",
    "Tell me what you see in {images}.",
    "Outline the sonographic appearance of {images}.",
    "For teaching: annotate {images} with a descriptive text.",
    "Render {images} in words.",
    "Provide the text that should stand under {images}.",
)

DIAGNOSIS = (
    "Which diagnosis fits {images} best? Name it and stop.",
    "Label {images} with a diagnosis.",
    "Name the diagnosis suggested by {images}.",
    "What is the diagnosis in {images}? The name alone.",
    "Assign {images} to a diagnostic category.",
    "If one diagnosis had to be entered for {images}, which?",
    "Classify {images}; answer with the category.",
    "Look at {images} and give the diagnosis without reasons.",
    "State the diagnostic label for {images}.",
    "Under which diagnosis would you file {images}?",
    "One diagnosis for {images}, please, and no explanation.",
    "Going by {images}, what is the diagnosis called?",
)

QUESTION = (
    "{question}",
    "Look at {images} and answer: {question}",
    "Going by {images}: {question}",
    "This concerns {images}. {question}",
    "Read {images}, then answer the question below.\n{question}",
    "A question about {images}: {question}",
    "With {images} in front of you: {question}",
    "{question} Answer from {images}.",
    "{question}\n(See {images}.)",
    "Please study {images} first. {question}",
    "On {images}, someone asks: {question}",
    "Judge from {images}. {question}",
)

CHOICE = (
    "Only one {statement} below belongs to {images}. Reply with its letter.",
    "Match {images} to a {statement}; the letter is enough.",
    "Multiple choice: which {statement} goes with {images}? Give the letter alone.",
    "Each {statement} below comes from another exam, except one of {images}. Which letter?",
    "Compare {images} with every {statement} listed and answer by letter.",
    "Pick the {statement} that was written for {images}. No text, only the letter.",
    "Under which letter is the {statement} of {images}?",
    "Find the {statement} that fits {images} and name its letter.",
    "From the list, choose the right {statement} for {images}: one letter.",
    "Look at {images}, then mark the letter of the true {statement}.",
    "Which letter stands before the {statement} that agrees with {images}?",
    "Choose by letter: the {statement} that matches {images}.",
)

CHOICE_RESTATE = (
    "Only one {statement} below belongs to {images}. Give its letter and copy it out.",
    "Match {images} to a {statement}, then write that option again in full.",
    "Multiple choice: which {statement} goes with {images}? Letter and wording, please.",
    "Each {statement} below comes from another exam, except one of {images}. Quote that one.",
    "Compare {images} with every {statement} listed; answer with the letter and its text.",
    "Pick the {statement} that was written for {images} and reproduce it word for word.",
    "Find the {statement} that fits {images}; state the letter followed by the text.",
    "From the list, choose the right {statement} for {images} and restate it.",
    "Look at {images}, mark the true {statement}, and write it down again.",
    "Choose and repeat: the {statement} that matches {images}.",
    "Which {statement} agrees with {images}? Answer with the option as it stands.",
    "First the letter, then the words: the {statement} for {images}.",
)

# Statements of these two kinds go where the wording says {statement}.
STATEMENT = {
    "description": ("description", "sonographic description", "set of findings"),
    "conclusion": ("conclusion", "diagnostic statement", "final statement"),
}
OWN_OPTIONS = (
    "{question}\n(Look at {images}; answer with the letter.)",
    "Look at {images} and choose one letter.\n{question}",
    "Multiple choice on {images}, letter only: {question}",
    "For {images}, which option is right? Name its letter.\n{question}",
)
OWN_OPTIONS_RESTATE = (
    "{question}\n(Look at {images}; answer with the letter and the text of the option.)",
    "Look at {images}, choose one option and write it out.\n{question}",
    "Multiple choice on {images}, letter and text: {question}",
    "For {images}, which option is right? Repeat it with its letter.\n{question}",
)
OWN_OPTIONS_WORDS = (
    "{question}\n(Look at {images}; answer in the option's words, without a letter.)",
    "Look at {images} and choose from the list; write the words.\n{question}",
    "Answer from {images}, in the words of one option: {question}",
    "For {images}, give the text of the right option, no letter.\n{question}",
)

JUDGE = (
    "Does the {statement} below belong to {images}? Yes or No.",
    "Please verify the {statement} against {images}: Yes if they agree, No if not.",
    "Someone wrote this {statement} for {images}. Is it right? Answer Yes or No.",
    "Check for a mix-up: was the following {statement} written about {images}? (Yes/No)",
    "Holding it against {images}, does the {statement} stand? Yes or No.",
    "Quality control: {images} and the {statement} below, one and the same exam? Yes or No.",
    "Could the {statement} that follows be signed for {images}? Reply Yes or No.",
    "Look at {images}, then read on. Do they go together? One word, Yes or No.",
    "Decide whether this is the {statement} of {images}: Yes or No.",
    "Is the {statement} below about {images}? Yes or No, nothing else.",
    "Text and image should match. Here: {images} and a {statement}. Do they? Yes or No.",
    "Would you file this {statement} with {images}? Yes or No.",
)
