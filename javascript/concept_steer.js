// The web UI's own progress bar and live preview, for the tab's button "Learn". Nothing on the page is cleared here:
// gradio would no longer find the elements it writes the results into.
function conceptSteerLearn() {
    const id = randomId();
    const gallery = gradioApp().getElementById("concept_steer_gallery");
    requestProgress(id, gallery, gallery, () => {}, () => {});
    const given = Array.from(arguments);
    given[0] = id;
    return given;
}
