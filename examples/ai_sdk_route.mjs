// A route of a web app (Next.js and the like) that streams a chat in the user's own manner with Vercel's AI SDK.
//
//   npm install ai @ai-sdk/openai-compatible
import { createOpenAICompatible } from '@ai-sdk/openai-compatible'
import { streamText } from 'ai'

const mta = createOpenAICompatible({
  name: 'mta',
  baseURL: `${process.env.MTA_URL ?? 'http://localhost:8000'}/v1`,
  apiKey: process.env.MTA_KEY,
})

export async function POST(request) {
  const { messages } = await request.json()
  const user = request.headers.get('X-Signed-In') // stands for the app's own session
  const result = streamText({
    model: mta('mta'),
    messages,
    maxOutputTokens: 60,
    headers: { 'X-User-ID': user },
  })
  return result.toTextStreamResponse()
}
