// The HTTP API, one method per call; answers are the server's own JSON. Runs wherever `fetch` does.

const FIRST_PAUSE_MS = 500, MAX_PAUSE_MS = 30_000
const TRANSIENT = new Set([408, 429, 502, 503, 504])

/** A call that failed: `code` is the server's reason, or no_answer, broken_off, timed_out or not_understood. */
export class MtaError extends Error {
  constructor(message, code, { status = 0, param = null, retryAfterS = null, cause } = {}) {
    super(message, { cause })
    Object.assign(this, { name: 'MtaError', code, status, param, retryAfterS })
  }

  /** Whether the same call may succeed later: the server was busy, or nobody answered. */
  get isTransient() {
    return this.code === 'no_answer' || TRANSIENT.has(this.status)
  }
}

export class Client {
  #url
  #headers
  #timeoutMs
  #retryMs
  #fetch

  /**
   * A call that the server was too busy to answer, or that got no answer, is sent again for at most `retryMs`; a stream
   * only before its first chunk. `timeoutMs` is the longest wait for data; a healthy stream sends some every 15 s.
   */
  constructor(url, { key, timeoutMs = 120_000, retryMs = 30_000, fetch = globalThis.fetch } = {}) {
    key ??= globalThis.process?.env?.MTA_API_KEY
    this.#url = url.replace(/\/+$/, '')
    this.#headers = { 'Content-Type': 'application/json', ...(key && { Authorization: `Bearer ${key}` }) }
    this.#timeoutMs = timeoutMs
    this.#retryMs = retryMs
    this.#fetch = fetch
  }

  async ready() {
    return this.#once('GET', '/ready').then(() => true, () => false)
  }

  health() {
    return this.#once('GET', '/health')
  }

  putProfile(userId, items) {
    return this.#call('PUT', `${userPath(userId)}/profile`, { items: texts(items) })
  }

  addItems(userId, items) {
    return this.#call('POST', `${userPath(userId)}/profile/items`, { items: texts(items) })
  }

  user(userId) {
    return this.#call('GET', userPath(userId))
  }

  export(userId) {
    return this.#call('GET', `${userPath(userId)}/export`)
  }

  async forget(userId, { missingOk = false } = {}) {
    try {
      return await this.#call('DELETE', userPath(userId))
    } catch (error) {
      if (missingOk && error.status === 404 && error.param === 'user_id') return null
      throw error
    }
  }

  generate(userId, prompt, options = {}) {
    return this.#call('POST', '/generate', { ...question(userId, prompt), ...options })
  }

  /** Yields OpenAI's chunks; leaving the loop stops the generation. */
  stream(userId, prompt, options = {}) {
    return this.#events('POST', '/generate', { ...question(userId, prompt), ...options, stream: true })
  }

  rewrite(userId, draft, options = {}) {
    return this.#call('POST', '/rewrite', { user_id: userId, draft, ...options })
  }

  adapt(userId, samples, options = {}) {
    return this.#call('POST', `${userPath(userId)}/adapt`, { samples: texts(samples), ...options })
  }

  async adapters(userId) {
    return (await this.#call('GET', `${userPath(userId)}/adapters`)).adapters
  }

  serve(userId, version) {
    return this.#call('POST', `${userPath(userId)}/adapters/${version}/serve`)
  }

  feedback(userId, answer, given) {
    return this.#call('POST', `${userPath(userId)}/feedback`, { answer, ...given })
  }

  worth() {
    return this.#call('GET', '/worth')
  }

  job(jobId) {
    return this.#call('GET', `/jobs/${encodeURIComponent(jobId)}`)
  }

  cancel(jobId) {
    return this.#call('DELETE', `/jobs/${encodeURIComponent(jobId)}`)
  }

  /** Yields a job now and after each change, until it has ended. */
  events(jobId) {
    return this.#events('GET', `/jobs/${encodeURIComponent(jobId)}/events`)
  }

  async wait(jobId, { timeoutMs = 600_000, pollMs = 200 } = {}) {
    const deadline = Date.now() + timeoutMs
    for (;;) {
      const job = await this.job(jobId)
      if (job.ended_at !== null) return job
      if (Date.now() > deadline) throw new MtaError(`job ${jobId} is ${job.state} after ${timeoutMs} ms`, 'timed_out')
      await pause(pollMs)
    }
  }

  #call(method, path, body) {
    return this.#patiently(() => this.#once(method, path, body))
  }

  async #once(method, path, body) {
    const { response, end } = await this.#send(method, path, body)
    try {
      return await response.json()
    } catch (cause) {
      throw new MtaError(`${method} ${path} got an answer that is not JSON`, 'not_understood', { cause })
    } finally {
      end()
    }
  }

  async *#events(method, path, body) {
    const { response, again, end } = await this.#patiently(() => this.#send(method, path, body))
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
    let rest = ''
    try {
      for (;;) {
        const { value, done } = await reader.read().catch((cause) => {
          throw new MtaError('the stream broke off', 'broken_off', { cause })
        })
        if (done) throw new MtaError('the server closed the stream before its end', 'broken_off')
        again()
        const lines = (rest + value).split('\n')
        rest = lines.pop()
        for (const line of lines.filter((each) => each.startsWith('data:'))) {
          const data = line.slice(5).trim()
          if (data === '[DONE]') return
          const event = JSON.parse(data)
          if (event.error) throw new MtaError(event.error.message, event.error.code, { param: event.error.param })
          yield event
        }
      }
    } finally {
      end()
    }
  }

  /** Returns a 2xx response; `again` starts its timeout anew, and `end` closes it. */
  async #send(method, path, body) {
    const control = new AbortController()
    let timer
    const again = () => {
      clearTimeout(timer)
      timer = setTimeout(() => control.abort(new Error(`no data for ${this.#timeoutMs} ms`)), this.#timeoutMs)
    }
    const end = () => {
      clearTimeout(timer)
      control.abort()
    }
    again()
    const content = { method, headers: this.#headers, body: body && JSON.stringify(body), signal: control.signal }
    try {
      const response = await this.#fetch(this.#url + path, content).catch((cause) => {
        throw new MtaError(`${method} ${path} got no answer from ${this.#url}: ${cause.message}`, 'no_answer', { cause })
      })
      if (!response.ok) throw await errorOf(response)
      return { response, again, end }
    } catch (error) {
      end()
      throw error
    }
  }

  async #patiently(attempt) {
    const since = Date.now()
    for (let longest = FIRST_PAUSE_MS; ; longest = Math.min(2 * longest, MAX_PAUSE_MS)) {
      try {
        return await attempt()
      } catch (error) {
        const wait = error.retryAfterS === null ? longest * (0.5 + Math.random() / 2) : error.retryAfterS * 1000
        if (!error.isTransient || Date.now() - since + wait > this.#retryMs) throw error
        await pause(wait)
      }
    }
  }
}

async function errorOf(response) {
  const retryAfter = response.headers.get('Retry-After') ?? ''
  const details = { status: response.status, retryAfterS: /^\d+$/.test(retryAfter) ? Number(retryAfter) : null }
  const text = await response.text()
  try {
    const { message, code, param } = JSON.parse(text).error
    return new MtaError(message, code, { ...details, param })
  } catch {
    return new MtaError(text.slice(0, 2000), 'not_understood', details) // from a proxy
  }
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms))
const userPath = (userId) => `/users/${encodeURIComponent(userId)}`
const texts = (items) => items.map((item) => (typeof item === 'string' ? { text: item } : item))
const question = (userId, prompt) => ({ user_id: userId, ...(typeof prompt === 'string' ? { prompt } : { messages: prompt }) })
