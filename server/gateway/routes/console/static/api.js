// Client of the gateway's API. Every failure becomes a `Failure` with a message for the user.

const ROOT = new URL('../', import.meta.url);
const SILENT_MS = 45_000; // the gateway sends a comment every 15 s

export class Failure extends Error {
	constructor(message, status = 0) {
		super(message);
		this.status = status;
	}
}

const GONE = 'The gateway does not answer. It may be restarting, or the connection may be lost: try again in a moment.';
const BROKEN = 'The connection to the gateway was lost.';
const SILENT = 'The gateway has sent nothing for 45 seconds. Try again.';

export const gateway = (path = '') => new URL(path.replace(/^\//, ''), ROOT).href;

/** The API key, stored for this tab only. */
export const key = {
	get: () => sessionStorage.getItem('key') ?? '',
	set: (value) => sessionStorage.setItem('key', value),
};

export const userPath = (id) => `/users/${encodeURIComponent(id)}`;

export const wasStopped = (error) => error?.name === 'AbortError';

/** Calls the API and returns the JSON; `also` lists accepted statuses besides 2xx. */
export async function call(method, path, body, { signal, also = [] } = {}) {
	const response = await send(method, path, body, signal, also);
	try {
		return await response.json();
	} catch (error) {
		throw wasStopped(error) ? error : new Failure(BROKEN);
	}
}

export async function text(path, signal) {
	const response = await send('GET', path, undefined, signal, []);
	return response.text().catch((error) => { throw wasStopped(error) ? error : new Failure(BROKEN); });
}

/** Yields the values of server-sent events until `[DONE]`. */
export async function* events(method, path, body, signal) {
	const response = await send(method, path, body, signal, []);
	const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
	let rest = '';
	try {
		for (;;) {
			const { value, done } = await within(SILENT_MS, reader.read());
			if (done) throw new Failure(BROKEN);
			const lines = (rest + value).split('\n');
			rest = lines.pop();
			for (const line of lines) {
				if (!line.startsWith('data:')) continue;
				const data = line.slice(5).trim();
				if (data === '[DONE]') return;
				const told = JSON.parse(data);
				if (told.error && told.error.message) throw new Failure(told.error.message);
				yield told;
			}
		}
	} catch (error) {
		if (wasStopped(error) || error instanceof Failure) throw error;
		throw new Failure(BROKEN);
	} finally {
		reader.cancel().catch(() => {});
	}
}

async function send(method, path, body, signal, also) {
	const headers = { ...(key.get() && { Authorization: `Bearer ${encodeURI(key.get())}` }), ...(body && { 'Content-Type': 'application/json' }) };
	let response;
	try {
		response = await fetch(gateway(path), { method, signal, headers, body: body && JSON.stringify(body), cache: 'no-store' });
	} catch (error) {
		throw wasStopped(error) ? error : new Failure(GONE);
	}
	if (response.ok || also.includes(response.status)) return response;
	throw await refusal(response);
}

async function refusal(response) {
	const { status } = response;
	try {
		const { error } = await response.json();
		if (!error.message) throw error;
		return new Failure(error.message, status);
	} catch {
		return new Failure(`The gateway answered with status ${status} and no explanation.`, status);
	}
}

function within(milliseconds, promise) {
	let timer;
	const late = new Promise((_, reject) => {
		timer = setTimeout(() => reject(new Failure(SILENT)), milliseconds);
	});
	return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}
