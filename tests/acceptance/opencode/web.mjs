// Drives OpenCode's web app in a headless Chromium against a server.
// node web.mjs URL ASSETS DIRECTORY CHROMIUM PICTURES, in a folder whose node_modules has playwright-core.
// The page comes from ASSETS, a server of OpenCode's; every call it makes goes to URL. What is done
// and seen is printed, a line of JSON each; "kill" waits for a line, when the server is up again.
import { once } from "node:events"
import { mkdtempSync } from "node:fs"
import { createRequire } from "node:module"
import { tmpdir } from "node:os"
import { join } from "node:path"
import { createInterface } from "node:readline"

const { chromium } = createRequire(join(process.cwd(), "node.js"))("playwright-core")
const [url, assets, directory, executablePath, pictures] = process.argv.slice(2)
const answers = createInterface({ input: process.stdin })
const flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
const quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
const profile = mkdtempSync(join(tmpdir(), "web-"))
const options = { executablePath, args: [...flags, ...quiet], viewport: { width: 1200, height: 800 } }
const context = await chromium.launchPersistentContext(profile, options)
const page = context.pages()[0] ?? (await context.newPage())
page.setDefaultTimeout(60_000)
const errors = []
page.on("pageerror", (error) => errors.push(error.message))

await page.route("**/*", async (route) => {
  const request = route.request()
  const place = new URL(request.url())
  if (place.origin !== url) return route.abort()
  const calls = ["fetch", "xhr", "eventsource"].includes(request.resourceType())
  if (calls && !place.pathname.startsWith("/assets/")) return route.continue()
  await route.fulfill({ response: await route.fetch({ url: assets + place.pathname + place.search }) })
})

let count = 0
async function saw(what, more = {}) {
  await page.screenshot({ path: join(pictures, `${++count}-${what}.png`) })
  console.log(JSON.stringify({ saw: what, ...more }))
}
const text = () => page.evaluate(() => document.body.innerText)
const shows = (words) => page.waitForFunction((words) => document.body.innerText.includes(words), words)
const box = () => page.locator('[contenteditable="true"], textarea').first()
async function prompt(words) {
  await box().waitFor()
  await box().click()
  await page.keyboard.type(words)
  await page.keyboard.press("Enter")
}
async function restart() {
  console.log(JSON.stringify({ do: "kill" }))
  await once(answers, "line")
}

await page.goto(`${url}/${Buffer.from(directory).toString("base64url")}/session`)
await box().waitFor()
await saw("app")

await prompt("long-stream please")
await shows("word15")
const early = await text()
await shows("word60")
await saw("streaming", { grew: !early.includes("word60") })

await restart()
await page.waitForFunction(() => !document.body.innerText.includes("Thinking"))
await saw("recovered", { kept: (await text()).includes("word20") })

await prompt("hello again")
await shows("You said: hello again")
await saw("answered")

await prompt("ask-bash please")
await page.getByRole("button", { name: "Allow once" }).waitFor()
await saw("asked")
await page.getByRole("button", { name: "Allow once" }).click()
await shows("I was allowed to")
await saw("allowed")

await prompt("ask-bash please, again")
await page.getByRole("button", { name: "Allow once" }).waitFor()
await restart()
await page.waitForFunction(() => fetch("/permission").then((r) => r.json()).then((found) => found.length === 1))
await page.getByRole("button", { name: "Allow once" }).click()
await page.waitForFunction(() => document.body.innerText.split("I was allowed to").length > 2)
await saw("allowed-after-a-kill")

const session = page.url().split("/").at(-1)
await page.getByRole("button", { name: "More options" }).click()
await page.getByRole("menuitem", { name: "Delete..." }).click()
await page.getByRole("dialog").getByRole("button", { name: /delete/i }).click()
await page.waitForFunction((id) => !location.pathname.includes(id), session)
await saw("deleted", { session, errors })
await context.close()
process.exit(0)
