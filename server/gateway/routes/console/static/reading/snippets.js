// The playground's question or draft as curl and Python code; what is null in it is left to the server.
import { gateway } from '../api.js';

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

export const asBody = ({ user, prompt, drafted, maxTokens, temperature, history, strength, words }) => ({
	user_id: user,
	...(drafted ? { draft: prompt } : { prompt, learn: false }),
	history,
	...(maxTokens != null && { max_tokens: maxTokens }),
	...(temperature != null && { temperature }),
	...(strength !== 1 && { strength }),
	...(words != null && { words }),
});

export const route = ({ drafted }) => (drafted ? '/rewrite' : '/generate');

export const asCurl = (question) => [
	`curl -s ${gateway(route(question))} -H 'Content-Type: application/json' -H "Authorization: Bearer $MTA_API_KEY"`,
	`  -d ${quoted(JSON.stringify(asBody(question)))}`,
].join(' \\\n');

export function asPython(question) {
	const { history, strength, words } = question;
	const own = { ...(words != null && { words: words ? 'True' : 'False' }), ...(question.drafted && { rewrite: 'True' }) };
	const extra = Object.entries({ history, learn: 'False', ...(strength !== 1 && { strength }), ...own })
		.map(([name, value]) => `"${name}": ${value}`);
	return [
		'import os',
		'from openai import OpenAI',
		'',
		`client = OpenAI(base_url=${JSON.stringify(gateway('v1'))}, api_key=os.getenv("MTA_API_KEY", "none"))`,
		'answer = client.chat.completions.create(',
		'    model="mta",',
		`    user=${JSON.stringify(question.user)},`,
		`    messages=[{"role": "user", "content": ${JSON.stringify(question.prompt)}}],`,
		...(question.maxTokens == null ? [] : [`    max_tokens=${question.maxTokens},`]),
		...(question.temperature == null ? [] : [`    temperature=${question.temperature},`]),
		`    extra_body={${extra.join(', ')}},`,
		')',
		'print(answer.choices[0].message.content)',
		'print(answer.personalization["level"], answer.personalization["recipe"])',
		'',
	].join('\n');
}
