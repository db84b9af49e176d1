import type { components } from './api.js'

type Schemas = components['schemas']
type Personalization = Schemas['PersonalizationAnswer']

/** Texts, or items with the fields of the bank's task. */
export type Items = ReadonlyArray<string | Readonly<Record<string, unknown>>>
/** One user turn, or a conversation. */
export type Prompt = string | ReadonlyArray<{ role: 'system' | 'user' | 'assistant'; content: string }>
export type Options = Partial<Omit<Schemas['GenerateRequest'], 'user_id' | 'prompt' | 'messages' | 'stream'>>
export type RewriteOptions = Partial<Omit<Schemas['RewriteRequest'], 'user_id' | 'draft' | 'stream'>>
export type AdaptOptions = Partial<Omit<Schemas['AdaptRequest'], 'samples'>>

export type Answer = Schemas['GenerateAnswer']
export type Rewritten = Schemas['RewriteAnswer']
export type Profile = Schemas['ProfileAnswer']
export type User = Schemas['UserAnswer']
export type Erased = Schemas['ErasedAnswer']
export type Feedback = Schemas['FeedbackAnswer']
export type Job = Schemas['JobAnswer']
export type Worth = Schemas['WorthAnswer']
export type Health = Schemas['HealthAnswer']

/** A chunk of a stream: the first has `personalization`, the last `usage`, `moved` and `timings_ms`. */
export interface Chunk {
  id: string
  choices: Array<{ index: number; delta: { role?: string; content?: string }; finish_reason: string | null }>
  personalization?: Personalization
  usage?: Schemas['Usage'] | null
  moved?: number
  timings_ms?: Record<string, number>
}

/** A call that failed: `code` is the server's reason, or no_answer, broken_off, timed_out or not_understood. */
export class MtaError extends Error {
  readonly code: string
  readonly status: number
  readonly param: string | null
  readonly retryAfterS: number | null
  get isTransient(): boolean
}

export interface ClientOptions {
  /** By default MTA_API_KEY of the environment, where there is one. */
  key?: string
  /** Longest wait for data within an answer. */
  timeoutMs?: number
  /** For how long a call is repeated that the server was too busy for, or that got no answer. */
  retryMs?: number
  fetch?: typeof globalThis.fetch
}

export class Client {
  constructor(url: string, options?: ClientOptions)
  ready(): Promise<boolean>
  health(): Promise<Health>
  putProfile(userId: string, items: Items): Promise<Profile>
  addItems(userId: string, items: Items): Promise<Profile>
  user(userId: string): Promise<User>
  export(userId: string): Promise<Record<string, unknown>>
  forget(userId: string): Promise<Erased>
  forget(userId: string, options: { missingOk: boolean }): Promise<Erased | null>
  generate(userId: string, prompt: Prompt, options?: Options): Promise<Answer>
  stream(userId: string, prompt: Prompt, options?: Options): AsyncGenerator<Chunk, void, void>
  rewrite(userId: string, draft: string, options?: RewriteOptions): Promise<Rewritten>
  adapt(userId: string, samples: Items, options?: AdaptOptions): Promise<Job>
  adapters(userId: string): Promise<Array<Schemas['VersionAnswer']>>
  serve(userId: string, version: number): Promise<Schemas['VersionAnswer']>
  feedback(userId: string, answer: string, given: Omit<Schemas['FeedbackRequest'], 'answer'>): Promise<Feedback>
  worth(): Promise<Worth>
  job(jobId: string): Promise<Job>
  cancel(jobId: string): Promise<Job>
  events(jobId: string): AsyncGenerator<Job, void, void>
  wait(jobId: string, options?: { timeoutMs?: number; pollMs?: number }): Promise<Job>
}
