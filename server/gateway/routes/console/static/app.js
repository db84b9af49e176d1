// The console's frame, and the routing from links to pages.
import { render } from './vendor/preact.js';
import { call, key } from './api.js';
import { html, useEffect, useRef, useState } from './parts/html.js';
import { go, here } from './parts/links.js';
import { titled } from './parts/words.js';
import { Adapt } from './pages/adapt.js';
import { Bank } from './pages/bank.js';
import { Playground } from './pages/playground.js';
import { System } from './pages/system.js';
import { Users } from './pages/users.js';
import { Worth } from './pages/worth.js';

const PAGES = { playground: Playground, users: Users, adapt: Adapt, bank: Bank, worth: Worth, system: System };
const LOOK_MS = 5000;

function Console() {
	const [place, setPlace] = useState(here);
	const main = useRef();
	const seen = useRef(place.page);
	useEffect(() => {
		const moved = () => setPlace(here());
		addEventListener('hashchange', moved);
		return () => removeEventListener('hashchange', moved);
	}, []);
	const name = Object.hasOwn(PAGES, place.page) ? place.page : 'playground';
	useEffect(() => {
		document.title = `${titled(name)} · MTA console`;
		if (seen.current !== name) main.current.querySelector('h1')?.focus();
		seen.current = name;
	}, [name]);
	const skip = (event) => { event.preventDefault(); main.current.focus(); };
	return html`
		<a class="skip" href="#main" onClick=${skip}>Skip to the page</a>
		<header class="top">
			<span class="brand" aria-hidden="true">MTA</span>
			<nav aria-label="Pages">
				${Object.keys(PAGES).map((page) => html`<a key=${page} href=${go(page)}
					aria-current=${page === name ? 'page' : undefined}>${titled(page)}</a>`)}
			</nav>
			<input class="secret" type="password" aria-label="API key" placeholder="API key" autocomplete="off" value=${key.get()}
				onChange=${(event) => { key.set(event.target.value.trim()); location.reload(); }} />
			<${Readiness} />
		</header>
		<main ref=${main} id="main" tabindex="-1">
			<${PAGES[name]} key=${place} params=${place.params} />
		</main>`;
}

/** A constant display of whether the gateway is ready. */
function Readiness() {
	const [status, setStatus] = useState('looking');
	useEffect(() => {
		let timer;
		const look = async () => {
			if (!document.hidden) {
				setStatus(await call('GET', '/ready', undefined, { also: [503], signal: AbortSignal.timeout(LOOK_MS) }).then((ready) => ready.status, () => 'no answer'));
			}
			timer = setTimeout(look, LOOK_MS);
		};
		look();
		return () => clearTimeout(timer);
	}, []);
	const words = status.replaceAll('_', ' ');
	return html`<div role="status" class="readiness"><a class=${status === 'ready' ? 'ok' : 'off'} href=${go('system')}>
		<span class="dot" aria-hidden="true"></span>${words}</a></div>`;
}

render(html`<${Console} />`, Object.assign(document.getElementById('console'), { textContent: '' }));
