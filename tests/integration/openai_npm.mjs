// OpenAI's official npm client, unchanged but for its base URL, on the gateway over a real vLLM.
import assert from 'node:assert/strict'
import test from 'node:test'
import OpenAI from 'openai'

const { GATEWAY_URL, NOWHERE_URL } = process.env
const HELLO = [{ role: 'user', content: 'hello there' }]
const OURS = { model: 'mta', user: 'rosa', temperature: 0 }

const clientOf = (url, options = {}) => new OpenAI({ baseURL: `${url}/v1`, apiKey: 'unused', maxRetries: 0, ...options })
const client = clientOf(GATEWAY_URL)

test('a header says who asks, and fields of ours travel in the body', async () => {
  const known = clientOf(GATEWAY_URL, { defaultHeaders: { 'X-User-ID': 'rosa' } })
  const asked = known.chat.completions.create({ model: 'mta', messages: HELLO, max_tokens: 4, strength: 0, history: 1 })
  const { data, response } = await asked.withResponse()
  assert.match(data.personalization.recipe, /:c$/)
  assert.equal(response.headers.get('X-MTA-Recipe'), data.personalization.recipe)
})

test('models are listed', async () => {
  const names = []
  for await (const model of client.models.list()) names.push(model.id)
  assert.deepEqual(names, ['mta', 'base'])
})

test('prompts are continued as they are', async () => {
  const answer = await client.completions.create({ ...OURS, prompt: ['the sea', 'a rose'], max_tokens: 8, echo: true })
  assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1])
  assert.match(answer.choices[0].text, /^the sea/)
  assert.match(answer.choices[1].text, /^a rose/)
})

test('the helper for streams puts an answer together', async () => {
  const asked = { ...OURS, messages: HELLO, max_tokens: 24 }
  const whole = await client.chat.completions.create(asked)
  assert.equal(await client.chat.completions.stream(asked).finalContent(), whole.choices[0].message.content)
})

test('an answer follows its schema', async () => {
  const schema = { enum: ['the sea', 'the mill'] }
  const format = { type: 'json_schema', json_schema: { name: 'place', schema } }
  const answer = await client.chat.completions.create({
    ...OURS, temperature: 1, messages: HELLO, max_tokens: 64, response_format: format
  })
  assert.ok(schema.enum.includes(JSON.parse(answer.choices[0].message.content)))
})

test('logprobs come as they are asked for', async () => {
  const answer = await client.chat.completions.create({
    ...OURS, messages: HELLO, max_tokens: 6, logprobs: true, top_logprobs: 2
  })
  const tokens = answer.choices[0].logprobs.content
  assert.equal(tokens.length, answer.usage.completion_tokens)
  assert.ok(tokens.every((token) => token.top_logprobs.length === 2 && token.logprob <= 0))
})

test('n answers are n choices', async () => {
  const asked = { model: 'mta', user: 'rosa', messages: HELLO, max_tokens: 12, n: 2, seed: 3 }
  const answer = await client.chat.completions.create(asked)
  const [one, other] = answer.choices.map((choice) => choice.message.content)
  assert.ok(one && other && one !== other)
})

test('an unknown model is not found', async () => {
  await assert.rejects(client.chat.completions.create({ model: 'gpt-4', messages: HELLO }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError)
    assert.deepEqual([error.status, error.code, error.param], [404, 'model_not_found', 'model'])
    return true
  })
})

test('an engine that is down is a server error', async () => {
  const asked = { model: 'mta', messages: HELLO }
  await assert.rejects(clientOf(NOWHERE_URL).chat.completions.create(asked), OpenAI.InternalServerError)
})
