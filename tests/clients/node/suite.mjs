// What Node programs do with the `openai` and `@anthropic-ai/sdk` packages, against a server that runs.
//
// Usage: suite.mjs BASE_URL MODEL MODEL_PATH. Each case is told; the exit code says whether all passed.

import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const [base, model, path] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: "EMPTY", maxRetries: 0, timeout: 120_000 });
const claude = new Anthropic({ baseURL: base, apiKey: "EMPTY", maxRetries: 0, timeout: 120_000 });
const hi = [{ role: "user", content: "Say hello." }];

const cases = {
  async "models are listed, and answer to their path"() {
    const names = [];
    for await (const one of client.models.list()) names.push(one.id);
    assert(names.includes(model));
    const answer = await client.chat.completions.create({ model: path, messages: hi, max_tokens: 1 });
    assert.equal(answer.model, model);
  },

  async "chat, whole and streamed, says the same"() {
    const ask = { model, messages: hi, temperature: 0, max_tokens: 12 };
    const whole = await client.chat.completions.create(ask);
    let text = "";
    let usage;
    const stream = await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } });
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(usage.total_tokens, whole.usage.total_tokens);
  },

  async "the helper of streams ends with a completion"() {
    const runner = client.chat.completions.stream({ model, messages: hi, temperature: 0, max_tokens: 300 });
    const final = await runner.finalChatCompletion();
    assert(final.choices[0].message.content.length > 0);
  },

  async "responses, whole and streamed, say the same"() {
    const ask = { model, input: "Say hello.", temperature: 0, max_output_tokens: 12 };
    const whole = await client.responses.create(ask);
    let text = "";
    let last;
    for await (const event of await client.responses.create({ ...ask, stream: true })) {
      if (event.type === "response.output_text.delta") text += event.delta;
      last = event;
    }
    assert.equal(text, whole.output_text);
    assert(["response.completed", "response.incomplete"].includes(last.type));
  },

  async "the helper of responses ends with a response"() {
    const stream = client.responses.stream({ model, input: "Hi", temperature: 0, max_output_tokens: 300 });
    const final = await stream.finalResponse();
    assert.equal(final.status, "completed");
  },

  async "messages, whole and streamed, say the same"() {
    const ask = { model, messages: hi, max_tokens: 12, temperature: 0 };
    const whole = await claude.messages.create(ask);
    const stream = claude.messages.stream(ask);
    assert.equal(await stream.finalText(), whole.content[0].text);
    assert.equal((await stream.finalMessage()).stop_reason, whole.stop_reason);
  },

  async "errors have the types of the clients"() {
    const none = client.chat.completions.create({ model: "none", messages: hi });
    await assert.rejects(none, (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found");
    const hot = client.chat.completions.create({ model, messages: hi, temperature: 9 });
    await assert.rejects(hot, (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature");
    const other = claude.messages.create({ model: "none", messages: hi, max_tokens: 1 });
    await assert.rejects(other, (error) => error instanceof Anthropic.NotFoundError);
  },

  async "a stream that is aborted is no harm"() {
    const stream = await client.chat.completions.create({ model, messages: hi, max_tokens: 2000, stream: true });
    for await (const _ of stream) break;
    assert((await client.chat.completions.create({ model, messages: hi, max_tokens: 1 })).choices.length === 1);
  },
};

let failed = 0;
for (const [name, run] of Object.entries(cases)) {
  try {
    await run();
    console.log(`ok      ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}\n${error.stack}`);
  }
}
console.log(`${Object.keys(cases).length - failed} of ${Object.keys(cases).length} cases passed`);
process.exit(failed ? 1 : 0);
