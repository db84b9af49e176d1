// The TypeScript client on a real gateway over a scripted engine.
import assert from 'node:assert/strict'
import { createServer } from 'node:http'
import test from 'node:test'
import { Client, MtaError } from '#mta-client'

const { GATEWAY_URL, USER } = process.env
const client = new Client(GATEWAY_URL)
const QUIET = { max_tokens: 4, temperature: 0 }

const failed = async (promise) => {
  const error = await promise.then(() => assert.fail('it succeeded'), (error) => error)
  assert(error instanceof MtaError, error)
  return error
}

/** A server that answers with these functions, one for each request, and counts the requests. */
const serving = async (...answers) => {
  const seen = []
  const server = createServer((request, response) => {
    seen.push(request.headers)
    answers[Math.min(seen.length, answers.length) - 1](response)
  })
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve))
  return { url: `http://127.0.0.1:${server.address().port}`, seen, close: () => server.closeAllConnections() ?? server.close() }
}
const saying = (status, body, headers = {}) => (response) => response.writeHead(status, headers).end(JSON.stringify(body))
const busy = saying(503, { error: { message: 'busy', code: 'overloaded', param: null } }, { 'Retry-After': '0' })

test('a user from the first item to the last', async () => {
  const user = `${USER}?a=%2F&ü#é`
  const put = await client.putProfile(user, ['the sea was flat', { id: 'b', text: 'and the wind was low' }])
  assert.deepEqual([put.user_id, put.received, put.kept], [user, 2, 2])
  assert.equal((await client.addItems(user, ['a rose'])).kept, 3)
  assert.equal((await client.user(user)).items, 3)
  assert.equal((await client.export(user)).items.length, 3)
  assert.deepEqual(await client.adapters(user), [])
  assert.equal((await failed(client.serve(user, 1))).code, 'unknown_version')
  assert.equal((await client.forget(user)).erased.items, 3)
  assert.equal(await client.forget(`${USER}-unknown`, { missingOk: true }), null)
  const error = await failed(client.forget(`${USER}-unknown`))
  assert.deepEqual([error.status, error.code, error.param], [404, 'not_found', 'user_id'])
})

test('whole and streamed answers say the same', async () => {
  await client.putProfile(USER, ['the sea was flat'])
  const answer = await client.generate(USER, 'hello', QUIET)
  const chunks = []
  for await (const chunk of client.stream(USER, 'hello', QUIET)) chunks.push(chunk)
  assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? '').join(''), answer.text)
  assert.equal(chunks[0].personalization.level, 'merged')
  assert.deepEqual(chunks.at(-1).usage, answer.usage)
})

test('leaving a stream ends it', async () => {
  for await (const chunk of client.stream(USER, 'hello', { max_tokens: 64 })) {
    assert(chunk)
    break
  }
})

test('a refusal names the field, of a stream as well', async () => {
  const hot = { temperature: -1 }
  for (const call of [() => client.generate(USER, 'hi', hot), () => client.stream(USER, 'hi', hot).next()]) {
    const error = await failed(call())
    assert.deepEqual([error.status, error.code, error.param], [400, 'invalid_value', 'temperature'])
  }
})

test('samples become a job, which can be watched and cancelled', async () => {
  const samples = Array.from({ length: 8 }, (_, n) => ({ input: `question ${n}`, output: `${n} yes` }))
  const job = await client.adapt(USER, samples, { append: true })
  for await (const known of client.events(job.id)) {
    assert.equal(known.id, job.id)
    break
  }
  assert.equal((await client.cancel(job.id)).state, 'cancelled')
  assert.equal((await client.wait(job.id)).id, job.id)
})

test('an answer gets feedback', async () => {
  const answer = await client.generate(USER, 'hello', QUIET)
  assert.equal((await client.feedback(USER, answer.id, { rating: 'up' })).rating, 'up')
})

test('the server says whether it is ready, and a draft needs another bank', async () => {
  assert.equal((await client.health()).status, 'ok')
  assert.equal(await new Client('http://127.0.0.1:9', { retryMs: 0 }).ready(), false)
  assert.equal((await failed(client.rewrite(USER, 'a draft'))).code, 'no_rewrite_bank')
})

test('a busy server is asked again, with the key', async () => {
  const server = await serving(busy, busy, saying(200, { id: 'j' }))
  assert.deepEqual(await new Client(`${server.url}/`, { key: 'mta_x' }).job('j'), { id: 'j' })
  assert.deepEqual(server.seen.map((headers) => headers.authorization), Array(3).fill('Bearer mta_x'))
  server.close()
})

test('what the server refuses, and what takes too long, is not asked again', async () => {
  const server = await serving(saying(400, { error: { message: 'no', code: 'invalid_value', param: 'x' } }))
  assert.equal((await failed(new Client(server.url).job('j'))).param, 'x')
  const away = await failed(new Client('http://127.0.0.1:9', { retryMs: 0 }).job('j'))
  assert.deepEqual([away.code, away.status, away.isTransient], ['no_answer', 0, true])
  assert.equal(server.seen.length, 1)
  server.close()
})

test('an answer that never comes ends after the timeout', async () => {
  const server = await serving(() => {})
  assert.equal((await failed(new Client(server.url, { timeoutMs: 100, retryMs: 0 }).job('j'))).code, 'no_answer')
  server.close()
})

test('what a proxy says, and a stream without end, are errors', async () => {
  const server = await serving(
    (response) => response.writeHead(502).end('<html>bad gateway'),
    (response) => response.end('not JSON'),
    (response) => response.end('data: {"choices": []}\n\n'),
    (response) => response.end('data: {"error": {"message": "m", "code": "engine_failed", "param": null}}\n\n'),
  )
  const proxied = new Client(server.url, { retryMs: 0 })
  assert.equal((await failed(proxied.job('j'))).message, '<html>bad gateway')
  assert.equal((await failed(proxied.job('j'))).code, 'not_understood')
  const stream = proxied.stream('rosa', 'hi')
  assert.deepEqual((await stream.next()).value, { choices: [] })
  assert.equal((await failed(stream.next())).code, 'broken_off')
  assert.equal((await failed(proxied.stream('rosa', 'hi').next())).code, 'engine_failed')
  server.close()
})
