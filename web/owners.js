// @ts-check
/** Which workflow a prompt came from: others may be shown while it runs, with nodes of the same ids. */

/**
 * Watch what is queued, and return a function that gives the workflow of a prompt by its id.
 * @param {{ queuePrompt(...values: unknown[]): Promise<{ prompt_id?: string } | undefined> }} api
 * @param {() => HostWorkflow | null | undefined} shown gives the workflow that is shown
 */
export function watchQueue(api, shown) {
  /** @type {Map<unknown, HostWorkflow | null | undefined>} */
  const owners = new Map();
  /** @type {HostWorkflow | null | undefined} */
  let asking; // its prompt is on its way to the server: word of it may come before its id
  const { queuePrompt } = api;
  api.queuePrompt = async (...values) => {
    const workflow = shown();
    asking = workflow;
    try {
      const answer = await queuePrompt.apply(api, values);
      owners.set(answer?.prompt_id, workflow);
      return answer;
    } finally {
      asking = null;
    }
  };
  return (/** @type {unknown} */ prompt) => owners.get(prompt) ?? asking ?? shown();
}
