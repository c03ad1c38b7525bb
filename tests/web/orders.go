// Places orders with Go's net/http: some of them in chunks, and one that is asked for before its body is sent.
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

const order = `{"user_id": 1, "items": [{"name": "Pen", "quantity": 1}]}`

func place(client *http.Client, url string, number int) int {
	var body io.Reader = strings.NewReader(order)
	if number%4 == 0 {
		body = io.MultiReader(body) // its length is not known
	}
	request, err := http.NewRequest("POST", url+"/orders", body)
	if err != nil {
		panic(err)
	}
	request.Header.Set("Content-Type", "application/json")
	if number%4 == 1 {
		request.Header.Set("Expect", "100-continue")
	}
	answer, err := client.Do(request)
	if err != nil {
		panic(err)
	}
	defer answer.Body.Close()
	if _, err := io.Copy(io.Discard, answer.Body); err != nil {
		panic(err)
	}
	return answer.StatusCode
}

func main() {
	count, _ := strconv.Atoi(os.Args[2])
	transport := &http.Transport{MaxIdleConnsPerHost: 16, ExpectContinueTimeout: 30 * time.Second}
	client := &http.Client{Transport: transport}
	statuses := make([]int, count)
	var all sync.WaitGroup
	for worker := 0; worker < 16; worker++ {
		all.Add(1)
		go func(worker int) {
			defer all.Done()
			for number := worker; number < count; number += 16 {
				statuses[number] = place(client, os.Args[1], number)
			}
		}(worker)
	}
	all.Wait()
	created := 0
	for _, status := range statuses {
		if status == 201 {
			created++
		}
	}
	fmt.Println(created)
}
