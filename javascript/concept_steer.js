// The web UI's own progress bar and live preview, for the tab's buttons. Nothing on the page is cleared here:
// gradio would no longer find the elements it writes the results into.
function conceptSteerWork(gallery, given) {
    const id = randomId();
    const place = gradioApp().getElementById(gallery);
    requestProgress(id, place, place, () => {}, () => {});
    const values = Array.from(given);
    values[0] = id;
    return values;
}

function conceptSteerLearn() {
    return conceptSteerWork("concept_steer_gallery", arguments);
}

function conceptSteerAudit() {
    return conceptSteerWork("concept_steer_audit_gallery", arguments);
}

function conceptSteerErase() {
    return conceptSteerWork("concept_steer_erase_gallery", arguments);
}
