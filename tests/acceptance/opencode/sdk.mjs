// Drives both generations of the JavaScript SDK against a server; prints what it saw as JSON.
// node sdk.mjs URL DIRECTORY, where a node_modules with @opencode-ai/sdk is the working directory's.
import { pathToFileURL } from "node:url"
const load = async (path) =>
  (await import(pathToFileURL(`${process.cwd()}/node_modules/@opencode-ai/sdk/dist/${path}`))).createOpencodeClient
const v1 = await load("index.js")
const v2 = await load("v2/index.js")
const [baseUrl, directory] = process.argv.slice(2)
const seen = {}
for (const [name, make] of [["v1", v1], ["v2", v2]]) {
  const client = make({ baseUrl, directory })
  const types = []
  const stop = new AbortController()
  const events = await client.event.subscribe({ signal: stop.signal })
  const reading = (async () => { for await (const e of events.stream) types.push(e.type) })().catch(() => {})
  await new Promise((r) => setTimeout(r, 300))
  const arg = (id, body) => name === "v1" ? { path: { id }, body } : { sessionID: id, ...body }
  const created = await client.session.create(name === "v1" ? { body: { title: "flow" } } : { title: "flow" })
  const id = created.data.id
  const got = await client.session.get(arg(id))
  const list = await client.session.list()
  const prompt = await client.session.prompt(arg(id, { parts: [{ type: "text", text: "hello" }] }))
  const messages = await client.session.messages(arg(id))
  const fork = await client.session.fork(arg(id, {}))
  const renamed = await client.session.update(arg(id, { title: "renamed" }))
  const missing = await client.session.get(arg("ses_nope"))
  const status = await client.session.status()
  const child = await client.session.create(name === "v1" ? { body: { parentID: id } } : { parentID: id })
  const children = await client.session.children(arg(id))
  const aborted = await client.session.abort(arg(id))
  const shell = await client.session.shell(arg(id, { agent: "build", command: "echo shell-hi" }))
  const summarize = await client.session.summarize(arg(id, { providerID: "mock", modelID: "slow" }))
  const providers = await client.config.providers()
  const agents = await client.app.agents()
  const removed = await client.session.delete(arg(id))
  const gone = await client.session.get(arg(id))
  await new Promise((r) => setTimeout(r, 300))
  stop.abort()
  await Promise.race([reading, new Promise((r) => setTimeout(r, 500))])
  seen[name] = {
    title: got.data?.title, listed: list.data?.some((s) => s.id === id), text: prompt.data?.parts?.find((p) => p.type === "text")?.text,
    role: prompt.data?.info?.role, messages: messages.data?.map((m) => m.info.role), fork: fork.data?.title, renamed: renamed.data?.title,
    missing: missing.error, status: status.data, children: children.data?.length, aborted: aborted.data,
    shell: shell.data?.parts?.find((p) => p.type === "tool")?.state?.output, summarize: summarize.data ?? summarize.error,
    providers: providers.data?.providers?.map((p) => p.id), agents: agents.data?.map((a) => a.name), removed: removed.data, gone: gone.error?.name, types,
  }
}
console.log(JSON.stringify(seen, null, 1))
process.exit(0)
