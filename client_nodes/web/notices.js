// Shows what must not be missed, such as a picture that was painted here and not by the server.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const SHOWN_MS = 30000;

app.registerExtension({
  name: "triton-full-pipeline.notices",
  setup() {
    api.addEventListener("triton_full_pipeline.notice", ({ detail }) => {
      app.extensionManager.toast.add({ ...detail, life: SHOWN_MS });
    });
  },
});
